"""Data sets of TensorFlow Datasets: opened without TensorFlow, and how to bring one that is not there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmn_lopt.tasks.data.cache import DataError


def resolved(data_dir: str | None) -> str | None:
    """The data directory as it is kept beside cached arrays; None for the default one."""
    return None if data_dir is None else str(Path(data_dir).expanduser().resolve())


def read_splits(name: str, data_dir: str | None, kept: Path, read: Callable[[Any], Any]) -> dict[str, Any]:
    """What ``read`` makes of ``"train"`` and of ``"test"``, after preparing the data set where that was not done.

    Args:
        name: the data set's name in TensorFlow Datasets.
        data_dir: where it is read from; None for the default directory.
        kept: the cache file that would have made reading unnecessary.
        read: is given a random-access source.

    Raises:
        DataError: whatever went wrong, and how to bring the data set.
    """
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir)
        if not builder.is_prepared():
            try:
                import tensorflow  # noqa: F401  # without it preparing fails, but only after the download
            except ImportError as error:
                raise DataError(f"it is not prepared there, and preparing it needs TensorFlow ({error})") from error
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        return {split: read(builder.as_data_source(split)) for split in ("train", "test")}
    except Exception as error:  # TensorFlow Datasets documents no base class for what goes wrong in it
        where = data_dir or "the default directory of TensorFlow Datasets"
        place = f", data_dir={data_dir!r}" if data_dir else ""
        prepare = f"tfds.builder({name!r}, file_format='array_record'{place}).download_and_prepare()"
        raise DataError(
            f"data set {name!r} has no usable cache {kept} and cannot be read from {where}: "
            f"{' '.join(str(error).split()) or type(error).__name__}. To bring it: pip install 'gmn_lopt[datasets]' "
            f'tensorflow; python -c "import tensorflow_datasets as tfds; {prepare}" (only this step needs TensorFlow '
            "and a network); or pass --data-dir DIR where it is prepared already"
        ) from error
