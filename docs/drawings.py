"""Draws the packed layouts and the way of a weight: docs/images/*.svg.

    python docs/drawings.py

The layouts are those of cpu/lscd_layout.h and cpu/gather_layout.h. Colours follow the
mode of the page.
"""

import pathlib
from collections.abc import Callable

IMAGES = pathlib.Path(__file__).resolve().parent / "images"
WIDTH = 760

STRIP_ROWS, STEP_K, LANES, SEGMENT_WORDS, RING_SEGMENTS = 16, 64, 32, 16, 5
LANE = 5  # the one that is drawn: g = 1, t = 1
# The stored positions of the drawn lane's two streams in one step, as an example.
STORED = ((0, 1, 4, 7, 8, 12, 13), (2, 3, 5, 9, 10, 14))

STYLE = """<style>
svg { --ink: #222; --paper: #fff; --line: #bbb; --soft: #eef1f5; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #ddd; --paper: #1e2129; --line: #555c6b; --soft: #2a2f3a; }
}
text { font: 13px sans-serif; fill: var(--ink); }
.small { font-size: 11px; }
.tiny { font-size: 8px; fill: #fff; }
.box { fill: var(--soft); stroke: var(--line); }
.cell { fill: none; stroke: var(--line); stroke-width: 0.5; }
.zero { fill: #c94f63; stroke: var(--line); stroke-width: 0.5; }
.first { fill: #2f7fd0; stroke: var(--line); stroke-width: 0.5; }
.second { fill: #1f8a74; stroke: var(--line); stroke-width: 0.5; }
.line { stroke: var(--ink); fill: none; }
.light { stroke: var(--line); fill: none; }
</style>"""


def columns(lane: int) -> list[int]:
    """The columns of a step that belong to a lane, by position in its streams."""
    t = lane % 4
    return [16 * (i // 4) + 8 * (i // 2 % 2) + 2 * t + i % 2 for i in range(16)]


def rows(lane: int) -> tuple[int, int]:
    """The rows of a strip that are a lane's stream 0 and stream 1."""
    return lane // 4, lane // 4 + 8


class Drawing:
    """The elements of an SVG."""

    def __init__(self, height: int):
        self.height = height
        self.elements: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, kind: str = "cell") -> None:
        """A rectangle."""
        self.elements.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, kind: str = "", anchor: str = "start"
    ) -> None:
        """A line of text; y is its base line."""
        self.elements.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
            f"{text}</text>"
        )

    def line(
        self, x0: float, y0: float, x1: float, y1: float, kind: str = "line"
    ) -> None:
        """A straight line."""
        self.elements.append(
            f'<line class="{kind}" x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"/>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A line with a head at its end."""
        self.elements.append(
            f'<path class="line" marker-end="url(#head)" '
            f'd="M{x0:g} {y0:g}L{x1:g} {y1:g}"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, *lines: str) -> None:
        """A rectangle with a title and lines of small text in it."""
        self.rect(x, y, w, h, "box")
        for i, line in enumerate(lines):
            self.text(x + w / 2, y + 20 + 16 * i, line, "small" if i else "", "middle")

    def svg(self) -> str:
        """The document."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto">'
            '<path d="M0 0L8 4L0 8z" style="fill: var(--ink)"/></marker>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
            f'{self.height}" width="{WIDTH}" height="{self.height}">',
            STYLE,
            f"<defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{self.height}" '
            'style="fill: var(--paper)"/>',
            *self.elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def layout() -> str:
    """A matrix in strips and steps, and one lane's elements of a step."""
    drawing = Drawing(390)
    x, y, step, strip = 60, 40, 40, 18
    for i in range(6):
        for j in range(10):
            drawing.rect(x + step * j, y + strip * i, step, strip)
    drawing.rect(x, y + 2 * strip, 10 * step, strip, "box")
    drawing.rect(x + 3 * step, y + 2 * strip, step, strip, "first")
    drawing.text(x + 5 * step, y - 12, "W: K inputs", anchor="middle")
    drawing.text(x - 12, y + 3 * strip, "M", anchor="end")
    drawing.text(x + 10 * step + 15, y + 2 * strip + 13, "a strip: 16 rows, a warp's")
    drawing.text(x + 10 * step + 15, y + 4 * strip + 13, "a step: 64 of its columns,")
    drawing.text(x + 10 * step + 15, y + 5 * strip + 13, "four fragments of 16 x 16")
    drawing.line(x + 4 * step, y + 3 * strip, x + 10 * step + 10, y + 4 * strip + 8)

    x, y, size = 60, 205, 10
    drawing.line(180, 76 + strip, x, y - 4, "light")
    drawing.line(180 + step, 76 + strip, x + STEP_K * size, y - 4, "light")
    for i in range(STRIP_ROWS):
        for j in range(STEP_K):
            drawing.rect(x + size * j, y + size * i, size, size)
    for row, kind in zip(rows(LANE), ("first", "second"), strict=True):
        for i, column in enumerate(columns(LANE)):
            drawing.rect(x + size * column, y + size * row, size, size, kind)
            at = x + size * column + size / 2
            drawing.text(at, y + size * row + 8, str(i), "tiny", "middle")
    for j in range(0, STEP_K + 1, 16):
        end = y + STRIP_ROWS * size
        drawing.line(x + size * j, y, x + size * j, end)
    for row, name in zip(rows(LANE), ("stream 0", "stream 1"), strict=True):
        drawing.text(x - 5, y + size * row + 9, name, "small", "end")
    drawing.text(
        x,
        y + STRIP_ROWS * size + 18,
        f"Lane {LANE} of 32 owns these elements of the step: "
        "its share of the tensor core's fragments, in their order.",
        "small",
    )
    return drawing.svg()


def streams() -> str:
    """Bitmap and values of one lane."""
    drawing = Drawing(345)
    x, size = 130, 26
    for stream, kind in enumerate(("first", "second")):
        y = 40 + 80 * stream
        drawing.text(x - 10, y + 17, f"stream {stream}", anchor="end")
        drawing.text(x - 10, y + 43, "bits", "small", "end")
        for i in range(16):
            kept = i in STORED[stream]
            drawing.rect(x + size * i, y, size, size, kind if kept else "cell")
            at = x + size * i + size / 2
            if kept:
                name = f"{'ab'[stream]}{STORED[stream].index(i)}"
                drawing.text(at, y + 17, name, "tiny", "middle")
            drawing.text(at, y + 43, str(int(kept)), "small", "middle")
    drawing.text(x, 26, "16 positions a step; only what is not zero is stored", "small")
    drawing.text(x + 17 * size, 57, "bitmap: 32 bits a lane")
    drawing.text(x + 17 * size, 75, "and step, 16 a stream", "small")

    y, wide, high, words = 210, 17, 15, 7
    drawing.text(x, y - 10, "values: segments of 16 words x 32 lanes, 2 KB", "small")
    for word in range(words):
        for lane in range(LANES):
            drawing.rect(x + wide * lane, y + high * word, wide, high)
        at = x + wide * LANE
        for stream, kind in enumerate(("first", "second")):
            if word < len(STORED[stream]):
                left = at + wide / 2 * stream
                drawing.rect(left, y + high * word, wide / 2, high, kind)
        drawing.text(x - 10, y + high * word + 12, f"word {word}", "small", "end")
    drawing.text(
        x + wide * (LANE + 0.5),
        y + words * high + 14,
        f"lane {LANE}",
        "small",
        "middle",
    )
    drawing.text(
        x + wide * 8,
        y + words * high + 14,
        "low half a0, a1, ...; high half b0, b1, ...; the bank is the lane",
        "small",
    )
    return drawing.svg()


def ring() -> str:
    """Segments in a warp's ring, and where its streams stand in them."""
    drawing = Drawing(250)
    x, y, wide, high = 60, 60, 120, 46
    names = ("segment 10", "segment 6", "segment 7", "segment 8", "segment 9")
    states = (
        "arriving",
        "slowest streams",
        "being read",
        "being read",
        "fastest streams",
    )
    for slot, (name, state) in enumerate(zip(names, states, strict=True)):
        drawing.box(x + wide * slot, y, wide, high, name, state)
        drawing.text(x + wide * (slot + 0.5), y - 8, f"slot {slot}", "small", "middle")
    drawing.arrow(x + wide / 2, 20, x + wide / 2, y - 22)
    drawing.text(
        x + wide / 2 + 10, 30, "2 KB copies from memory, one segment ahead", "small"
    )
    for lane in range(LANES):
        place = 1.3 + 3.4 * ((lane * 37 + 11) % 32) / 32  # slower and faster ones
        drawing.rect(x + wide * place, y + high + 10 + lane % 4 * 6, 4, 4, "first")
    drawing.text(x + wide * 2, y + high + 52, "where the lanes' streams stand", "small")
    drawing.rect(x, 190, 12, 12, "zero")
    drawing.text(
        x + 20,
        200,
        f"Streams drift apart. One that would fall out of the ring of {RING_SEGMENTS} "
        "segments is given explicit zeros",
        "small",
    )
    drawing.text(
        x + 20,
        216,
        "when the matrix is packed: 3 to 7% more values, and no check in the kernel.",
        "small",
    )
    return drawing.svg()


def gather_orders() -> list[list[int]]:
    """Columns of 8 rows with 8 nonzeros each, in an order as the packer might find.

    At a time no two of the rows are at columns that are alike modulo 8.
    """
    return [
        [
            8 * min(max(i + (5 * i + 3 * lane) % 4 - 1, 0), 7) + (3 * i + lane) % 8
            for i in range(8)
        ]
        for lane in range(8)
    ]


def gather() -> str:
    """Rows of the gather layout, and what is stored of one."""
    drawing = Drawing(330)
    x, y, size, drawn = 60, 50, 10, 2
    orders = gather_orders()
    drawing.text(
        x, 20, "8 of a strip's 32 rows, one a lane: 64 columns with 8 nonzeros"
    )
    drawing.text(
        x, 38, "numbers: when a lane multiplies them; blue: all lanes' first", "small"
    )
    for lane, order in enumerate(orders):
        for j in range(STEP_K):
            drawing.rect(x + size * j, y + size * lane, size, size)
        for i, column in enumerate(order):
            at = x + size * column
            kind = "second" if i else "first"
            drawing.rect(at, y + size * lane, size, size, kind)
            drawing.text(at + size / 2, y + size * lane + 8, str(i), "tiny", "middle")
    for j in range(0, STEP_K + 1, 8):
        drawing.line(x + size * j, y, x + size * j, y + 8 * size)
    drawing.text(x - 5, y + size * drawn + 9, f"lane {drawn}", "small", "end")
    drawing.text(
        x,
        y + 8 * size + 18,
        "At a time the lanes' columns differ modulo 8, so that no two of them read the "
        "same banks of x.",
        "small",
    )

    x, y, wide = 130, 190, 52
    drawing.text(x - 10, y + 17, "values", anchor="end")
    drawing.text(x - 10, y + 47, "distances", anchor="end")
    before = 0
    for i, column in enumerate(orders[drawn]):
        drawing.rect(x + wide * i, y, wide, 26, "second" if i else "first")
        at = x + wide * (i + 0.5)
        drawing.text(at, y + 17, f"a{i}", "tiny", "middle")
        drawing.rect(x + wide * i, y + 32, wide / 2, 22, "box")
        distance = f"{column - before:+d}".replace("-", "\u2212")
        drawing.text(x + wide * i + wide / 4, y + 47, distance, "small", "middle")
        before = column
    drawing.text(x + 8 * wide + 10, y + 17, "2 bytes each")
    drawing.text(x + 8 * wide + 10, y + 47, "1 byte each")
    drawing.text(
        x, y + 74, f"A chunk of lane {drawn}: its next 8 nonzeros, 24 bytes.", "small"
    )
    drawing.box(
        x,
        y + 88,
        8 * wide,
        44,
        "x in shared memory: 8 rows of x a column, 16 bytes",
        "one load a nonzero, 8 multiplications",
    )
    return drawing.svg()


def path() -> str:
    """From memory to the tensor core."""
    drawing = Drawing(330)
    drawing.text(95, 24, "GPU memory", anchor="middle")
    drawing.text(305, 24, "shared memory", anchor="middle")
    drawing.text(595, 24, "registers and tensor cores", anchor="middle")
    for at in (197, 413):
        drawing.line(at, 10, at, 320, "light")
    drawing.box(15, 45, 160, 62, "values", "compressed, read once", "2 KB a segment")
    drawing.box(15, 125, 160, 46, "bitmap", "1 bit an element")
    drawing.box(15, 225, 160, 46, "x", "N rows, in the L2 cache")
    drawing.box(
        220, 45, 170, 62, "ring of 5 segments", "one ring a warp", "bank = lane"
    )
    drawing.box(220, 225, 170, 46, "stages of x", "64 to 256 columns each")
    drawing.box(
        435,
        45,
        150,
        94,
        "decode",
        "bits pick the next",
        "value or zero:",
        "two loads, one",
        "permute a pair",
    )
    drawing.box(
        610,
        45,
        135,
        94,
        "fragment A",
        "16 x 64 dense",
        "in registers,",
        "never in memory",
    )
    drawing.box(
        610, 195, 135, 76, "tensor core", "wgmma or mma", "float32 sums", "stream-K"
    )
    drawing.arrow(175, 70, 220, 70)
    drawing.arrow(175, 148, 435, 120)
    drawing.arrow(175, 248, 220, 248)
    drawing.arrow(390, 70, 435, 70)
    drawing.arrow(585, 85, 610, 85)
    drawing.arrow(677, 139, 677, 195)
    drawing.arrow(390, 248, 610, 240)
    drawing.arrow(677, 271, 677, 298)
    drawing.text(677, 314, "y", anchor="middle")
    return drawing.svg()


DRAWINGS: dict[str, Callable[[], str]] = {
    "layout": layout,
    "streams": streams,
    "ring": ring,
    "gather": gather,
    "path": path,
}


def main() -> None:
    """Writes all drawings."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
