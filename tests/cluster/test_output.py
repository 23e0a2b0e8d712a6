"""How the launcher shows what many ranks say at once."""

import io

from llama_lib.cluster.output import Output, Source

FIRST, SECOND = Source(0, None), Source(1, None)
FAR, FARTHER = Source(8, "node2"), Source(9, "node2")


class Shown:
    def __init__(self) -> None:
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        streams = (self.stdout, self.stderr)
        self.output = Output(lambda stream, text: streams[stream].write(text))


def test_lines_of_ranks_do_not_mix():
    shown = Shown()
    shown.output.show(FIRST, False, "step 1 of")
    shown.output.show(SECOND, False, "a line\nan unfinished")
    shown.output.show(SECOND, False, " line\n")
    shown.output.show(FAR, False, "one\n\ntwo\nthr")
    shown.output.show(FAR, False, "ee\nfour")
    shown.output.say("launcher")
    shown.output.show(FIRST, False, "last\n")
    shown.output.finish()
    assert shown.stdout.getvalue() == (
        "step 1 of\na line\nan unfinished line\n"
        "[node2] one\n\n[node2] two\n[node2] three\n[node2] four\nlast\n"
    )
    assert shown.stderr.getvalue() == "launch: launcher\n"


def test_a_line_that_was_interrupted_is_named_again():
    shown = Shown()
    shown.output.show(FAR, False, "begun")
    shown.output.show(FIRST, False, "between\n")
    shown.output.show(FAR, False, " and ended\n")
    assert shown.stdout.getvalue() == "[node2] begun\nbetween\n[node2]  and ended\n"


def test_a_progress_bar_stays_as_it_is():
    shown = Shown()
    for text in ("\r", " 10%", "\r", " 20%", "\r 30%\n"):
        shown.output.show(FIRST, True, text)
    shown.output.show(FAR, True, "\r 10%\r 20%\n")
    assert shown.stderr.getvalue() == "\r 10%\r 20%\r 30%\n\r[node2]  10%\r[node2]  20%\n"


def test_a_mistake_of_all_is_said_once_whoever_is_first():
    for order in ((FIRST, FAR), (FAR, FIRST)):
        shown = Shown()
        for source in order:
            mark = "" if source is FIRST else "[rank 8] "
            shown.output.show(source, True, f"a warning\n{mark}--lr: got -1\n--tp: got 7\n")
            shown.output.ended(source, 2)
        shown.output.finish()
        said = shown.stderr.getvalue()
        assert said.count("--lr: got -1") == said.count("--tp: got 7") == 1, said
        assert said.count("a warning") == 2


def test_a_mistake_of_one_host_alone_is_said():
    shown = Shown()
    shown.output.show(FIRST, True, "--lr: got -1\n")
    shown.output.show(FAR, True, "[rank 8] the name of this host means 127.0.1.1\n")
    shown.output.ended(FAR, 2)
    shown.output.show(FARTHER, True, "[rank 9] the disk is full")
    shown.output.ended(FARTHER, 1)
    assert "[node2] [rank 9] the disk is full" in shown.stderr.getvalue()
    assert "127.0.1.1" not in shown.stderr.getvalue(), "kept until the first rank has spoken"
    shown.output.finish()
    assert "[node2] [rank 8] the name of this host means 127.0.1.1\n" in shown.stderr.getvalue()


def test_what_a_lost_rank_had_to_say_is_said():
    shown = Shown()
    shown.output.show(FAR, True, "[rank 8] no space left\n")
    shown.output.finish()
    assert shown.stderr.getvalue() == "[node2] [rank 8] no space left\n"
