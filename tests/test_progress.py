import io

from gmn_lopt.util.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_plain_line_at_the_ends_only():
    file = io.StringIO()
    with progress(300, "adam", "steps", file=file) as bar:
        for _ in range(300):
            bar.update()
            bar.set_postfix({"loss": "1.5"}, refresh=False)
    first, last = file.getvalue().splitlines()
    assert first.startswith("adam: 0/300 steps [")
    assert last.startswith("adam: 300/300 steps [") and last.endswith("loss=1.5]")
    assert "\r" not in file.getvalue()


def test_a_file_gets_a_line_when_time_has_passed_and_one_for_each_description(monkeypatch):
    file, now = io.StringIO(), [0.0]
    with progress(10_000, "adam", "steps", initial=2_000, scale=True, file=file) as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(4):
            now[0] += 20.0
            bar.update(2_000)
        bar.set_description("lion")
    counts = [line.split(" steps")[0] for line in file.getvalue().splitlines()]
    assert counts == [
        "adam: 2.00k/10.0k",
        "adam: 6.00k/10.0k",
        "adam: 10.0k/10.0k",
        "lion: 10.0k/10.0k",
        "lion: 10.0k/10.0k",
    ]


def test_a_terminal_gets_a_bar_in_one_line_and_a_disabled_one_nothing():
    file = Terminal()
    with progress(3, "adam", "steps", file=file) as bar:
        bar.update(3)
    assert "\r" in file.getvalue() and file.getvalue().count("\n") == 1 and "100%" in file.getvalue()
    file = io.StringIO()
    with progress(3, "adam", "steps", disable=True, file=file) as bar:
        bar.update(3)
    assert file.getvalue() == ""
