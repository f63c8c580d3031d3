"""Makes questions about program options, such as "In tar, what does --strip-components do?", from manual pages."""

from __future__ import annotations

import dataclasses
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from refrag.corpus.dictionaries import first_clauses, first_words
from refrag.corpus.questions import Question, QuestionSettings, draw_question
from refrag.corpus.texts import manual_html, parse_html, text_files

# Packages of programs with many options; the corpus contains none of their pages.
PROGRAMS = (
    "apt", "bind9-dnsutils", "binutils-common", "bsdextrautils", "bzip2", "coreutils", "cpio", "cryptsetup-bin",
    "curl", "diffutils", "dpkg", "dpkg-dev", "e2fsprogs", "fdisk", "ffmpeg", "findutils", "gawk", "gdb", "gnupg",
    "gpg", "grep", "gzip", "imagemagick-6-common", "iproute2", "iptables", "jq", "less", "login", "lvm2", "make",
    "man-db", "mdadm", "mount", "nftables", "openssh-client", "openssl", "parallel", "parted", "passwd", "patch",
    "procps", "qemu-utils", "rsync", "samba-common-bin", "screen", "sed", "smartmontools", "smbclient", "socat",
    "strace", "subversion", "sudo", "systemd", "tar", "tcpdump", "tmux", "unzip", "util-linux", "valgrind", "wget",
    "xz-utils", "zip", "zstd",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a program.

    Attributes
    ----------
    page : str
        The program.
    names : tuple of str
        All spellings, such as -x and --extract.
    heading, text : str
        The option's heading and description in the manual.
    source : str
        The package.
    """

    page: str
    names: tuple[str, ...]
    heading: str
    text: str
    source: str

    @property
    def passage(self) -> str:
        """The option as a passage."""
        return f"{self.page} {self.heading}: {first_words(self.text, 70)}"


def read_options(folder: Path, source: str) -> list[Option]:
    """Return the options described in the manual pages of an unpacked package."""
    options: dict[tuple[str, str], Option] = {}
    for file in text_files(folder):
        if file.kind == "man" and re.search(r"/man[18]/", file.name):
            content = file.path.read_bytes()
            page = re.sub(r"\.[18]\w*(\.gz)?$", "", file.path.name)
            html = manual_html(gzip.decompress(content) if file.name.endswith(".gz") else content)
            for heading, text in _described(parse_html(html)):
                names = tuple(re.findall(r"(?:(?<=[\s,|/])|^)--?[A-Za-z0-9][\w-]*", heading))
                if names and heading.startswith("-") and len(heading) <= 100:
                    options.setdefault((page, names[-1]), Option(page, names, heading, text, source))
    return list(options.values())


def option_questions(options: Sequence[Option], settings: QuestionSettings) -> tuple[list[Question], list[Question]]:
    """Return the training questions and the test questions, which have no page in common.

    Passages of hard questions are options of the same page, and options of the same name on other pages.

    Raises
    ------
    ValueError
        If there are too few options for a context.
    """
    sides: tuple[list[Question], list[Question]] = ([], [])
    for side in (0, 1):
        own = [option for option in options if settings.is_test(option.page, "options") == bool(side)]
        among = own if side == 0 else options
        others = [option.passage for option in among]
        of_page: dict[str, list[Option]] = {}
        of_name: dict[str, list[Option]] = {}
        for option in among:
            of_page.setdefault(option.page, []).append(option)
            for name in option.names:
                of_name.setdefault(name, []).append(option)
        for option in own:
            answer = first_clauses(option.text)
            if answer is None:
                continue
            name = max(option.names, key=len)
            draw = settings.random(f"alike/{option.page}/{name}")
            near = [o for o in of_page[option.page] if o is not option]
            named = [o for o in of_name[name] if o.page != option.page]
            alike = draw.sample(named, min(len(named), settings.passages // 2))
            alike += draw.sample(near, min(len(near), settings.passages))
            asked = f"In {option.page}, what does {name} do?"
            own_heading = re.compile(re.escape(option.page) + r" [^:]*(?<![\w-])" + re.escape(name) + r"(?![\w-])")
            sides[side].append(
                draw_question(
                    (asked, answer + "."),
                    option.passage,
                    [o.passage for o in alike],
                    others,
                    settings,
                    answers=lambda passage, own=own_heading: bool(own.match(passage)),  # type: ignore[misc]
                    domain="options",
                    source=option.source,
                )  # fmt: skip
            )
        settings.random(f"order/{side}").shuffle(sides[side])
    return sides


def _described(tree: Any) -> Iterator[tuple[str, str]]:
    """Yield headings with descriptions: from definition lists, and from paragraphs followed by an indented block."""
    for node in tree.body or ():  # all descendants, in document order
        if node.tag not in ("dt", "p"):
            continue
        following = node.next
        while following is not None and not following.text.strip():
            following = following.next
        if following is not None and (node.tag, following.tag) in (("dt", "dd"), ("p", "div")):
            if node.tag == "p" and "Bd-indent" not in (following.getattr("class") or ""):
                continue
            yield " ".join(node.text.split()), " ".join(following.text.split())
