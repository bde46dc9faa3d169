"""The mixture that the generalist optimizers are meta-trained on: small tasks that differ in everything.

Data sets, widths from 16 to 256, one to three hidden layers, batches of 32 to 256, inputs in [0, 1] or standardised,
classifiers and autoencoders, four activation functions, initial scales a factor of 3 off either way, horizons of 200 to
5,000 steps; and a transformer on text. Meta-training adds the rest at random (:mod:`gmn_lopt.meta.augmentation`): the
step size and the scale of every tensor.
"""

from gmn_lopt.meta.task import Task
from tasks import digits_mlp, text_transformer
from tasks._images import load_images
from tasks._mixture_model import Model, mlp_task

# Every horizon is a multiple of 25 and of 50, windows that meta-training uses. Wide models have short horizons: they
# would take most of the time otherwise.
MODELS: tuple[tuple[str, Model], ...] = (
    ("digits", Model((32,), 128, 500)),
    ("digits", Model((24, 24, 24), 64, 1000, "tanh", standardise=True)),
    ("digits", Model((16,), 32, 1000, "gelu", autoencode=True)),
    ("fashion_mnist", Model((32,), 128, 2000)),
    ("fashion_mnist", Model((64, 32), 64, 1000, "gelu", standardise=True, init_scale=1 / 3)),
    ("fashion_mnist", Model((16, 16), 256, 5000, "tanh", init_scale=3.0)),
    ("fashion_mnist", Model((48,), 128, 500, "silu", standardise=True, autoencode=True)),
    ("cifar10", Model((32,), 128, 2000)),
    ("cifar10", Model((64, 64), 32, 500, "silu", standardise=True)),
    ("cifar10", Model((16, 16, 16), 64, 1000, "relu", init_scale=3.0)),
    ("cifar10", Model((32, 16), 128, 200, "tanh", autoencode=True)),
    ("cifar100", Model((64,), 128, 1000)),
    ("cifar100", Model((256,), 64, 200, "gelu", standardise=True, init_scale=1 / 3)),
)
TEXT_HORIZON = 2000
SIZES = {"fashion_mnist": (64, 10), "cifar10": (192, 10), "cifar100": (192, 100)}


def make_all(data_dir: str | None = None) -> tuple[Task, ...]:
    """All tasks of the mixture.

    Args:
        data_dir: TensorFlow Datasets directory; see :func:`tasks._images.load_images`.
    """
    data = {name: load_images(name, *sizes, data_dir) for name, sizes in SIZES.items()}
    data["digits"] = digits_mlp.load()
    classes = {"digits": 10} | {name: sizes[1] for name, sizes in SIZES.items()}
    images = tuple(
        mlp_task(f"{name}-{index}", data[name], classes[name], model) for index, (name, model) in enumerate(MODELS)
    )
    return (*images, text_transformer.make(horizon=TEXT_HORIZON))
