"""Figures: what they say, where things stand, and that nothing of the user's text is taken for markup."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.drawing import Outline, figure, outline, page
from graphsplit.drawing.division import LOOKS, ByWidth
from graphsplit.drawing.layout import PAD, Placed, grid, place
from graphsplit.drawing.outline import Box
from graphsplit.drawing.svg import colour, drawing, open_boxes
from graphsplit.errors import BundleError, UserError
from graphsplit.program import Source
from zoo import vision

NASTY = "</script><b onload='alert(1)'>&\"]]>"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Alike blocks, a module that is called twice, a tied head, a temperature and a module of a nasty name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(4)])
        self.twice = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(1))
        self.add_module(NASTY.replace(".", ""), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        x = self.twice(self.twice(x) + 1)
        x = getattr(self, NASTY)(x) * self.scale
        return self.head(x)


@pytest.fixture(scope="module")
def part() -> gs.Partition:
    torch.manual_seed(0)
    return gs.partition(Net(), torch.randint(0, 11, (2, 5)), k=2)


@pytest.fixture(scope="module")
def drawn(part: gs.Partition) -> Outline:
    return outline(*part.drawn())


@pytest.fixture(scope="module")
def unet() -> Outline:
    divided = gs.partition(vision.UNet(), torch.randn(2, 3, 32, 32), k=2)
    return outline(*divided.drawn())


def leaves(box: Box) -> list[Box]:
    return [inner for inner in box.boxes() if not inner.children]


def find(root: Box, path: str, name: str = "") -> list[Box]:
    return [box for box in root.boxes() if box.path == path and name in (box.name, "")]


# What there is to draw


def test_parameters_are_counted_once_and_add_up(part: gs.Partition, drawn: Outline) -> None:
    idle = 3
    assert drawn.parameters == part.program.parameter_count()
    assert drawn.root.parameters == drawn.parameters - idle
    assert drawn.held == part.plan.parameter_counts()
    assert drawn.root.held == tuple(count - idle for count in drawn.held)
    assert any("idle" in note for note in drawn.notes)


def test_a_tied_weight_is_shown_where_it_is_used_first(drawn: Outline) -> None:
    (embed,) = find(drawn.root, "embed")
    (head,) = find(drawn.root, "head")
    assert (embed.parameters, head.parameters) == (88, 0)
    assert any("tied to head.weight" in line for line in embed.details)
    assert any("counted where it is used first, embedding in embed" in line for line in head.details)


def test_modules_that_are_alike_are_one_box(drawn: Outline) -> None:
    (alike,) = [box for box in drawn.root.boxes() if box.role == "alike"]
    assert (alike.name, alike.note) == ("blocks.0–3", "4 alike")
    assert [box.name for box in alike.children] == [f"blocks.{number}" for number in range(4)]
    assert alike.parameters == 4 * (16 + 8 * 16 + 16 + 16 * 8 + 8)


def test_modules_that_differ_are_not_alike() -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), a()) for a in (nn.ReLU, nn.ReLU, nn.Tanh, nn.ReLU))
    )
    root = outline(gs.trace(model, torch.randn(2, 8))).root
    assert [box.role for box in root.children] == ["input", *["module"] * 4, "output"]


def test_a_module_that_is_called_twice_has_two_boxes(drawn: Outline) -> None:
    first, second = find(drawn.root, "twice")
    assert (first.note, second.note) == ("2 ops", "2 ops, again")
    assert (first.parameters, second.parameters) == (72, 0)


def test_a_module_of_one_op_is_the_box_of_this_op(drawn: Outline) -> None:
    (norm,) = find(drawn.root, "blocks.0.norm")
    assert (norm.role, norm.name, norm.note, norm.children) == ("op", "norm", "layer_norm", ())


def test_looks_are_those_of_the_analysis(drawn: Outline) -> None:
    def look(path: str) -> str:
        (box,) = find(drawn.root, path)
        return box.bands[0].look

    assert look("blocks.0.up") == "split"
    assert look("blocks.0.norm") == "apart"
    assert look("head") == "mean"
    assert leaves(drawn.root)[0].bands[0].look == "common"
    assert [band.ops for band in drawn.root.bands] == [
        sum(leaf.role == "op" and leaf.bands[0].look == band.look for leaf in leaves(drawn.root))
        for band in drawn.root.bands
    ]


def test_details_hold_shapes_parameters_and_the_line(drawn: Outline) -> None:
    (up,) = find(drawn.root, "blocks.2.up")
    text = "\n".join(up.details)
    assert "float32[batch, 5, 16]; in each sub-model [batch, 5, 8]" in text
    assert "144 parameters; in each sub-model 40" in text
    assert "parameter blocks.2.up.weight [16, 8]; in each sub-model [8, 4]" in text
    assert re.search(r"test_drawing\.py:\d+\n    return x \+ self\.down\(torch\.relu\(self\.up", text)


def test_shares_follow_the_sizes() -> None:
    divided = gs.partition(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 4), k=2)
    (first, *_) = find(outline(*divided.drawn()).root, "0")
    assert first.bands[0].shares == (0.6, 0.4)


@pytest.mark.parametrize("name", ["drawn", "unet"])
def test_nets_are_the_uses_of_the_graph(name: str, request: pytest.FixtureRequest) -> None:
    root: Box = request.getfixturevalue(name).root

    def ends(box: Box, value: int) -> Iterator[int]:
        """Ops inside of a box that use a value from outside of it."""
        if not box.children:
            yield box.first
        for net in box.nets:
            if net.value == value and net.start is None:
                for end in net.ends:
                    yield from ends(box.children[end], value)

    found = set()
    for box in root.boxes():
        for net in box.nets:
            if net.start is not None:
                assert box.children[net.start].first <= net.value <= box.children[net.start].last
                assert all(end > net.start for end in net.ends), "against the order of the ops"
                found |= {
                    (net.value, end) for child in net.ends for end in ends(box.children[child], net.value)
                }
    shapes = {leaf.first: leaf for leaf in leaves(root)}
    # Every op but those without operands is reached, and what it uses is what its details say.
    for number, leaf in shapes.items():
        line = next((line for line in leaf.details if line.startswith("uses ")), "")
        used = [shapes[value].shape for value, end in sorted(found) if end == number]
        assert all(shape in line for shape in used) and len(used) == line.count("]"), leaf.details


def test_without_a_division_there_are_no_parts(part: gs.Partition) -> None:
    plain = outline(part.program)
    assert plain.k == 0 and not any(box.bands or box.held for box in plain.root.boxes())
    assert 'class="strip"' not in figure(plain) and "sub-model" not in page(plain).split("<script")[0]


def test_one_of_several_results_can_be_an_output() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x).chunk(2, -1)

    root = outline(gs.trace(Halves(), torch.randn(2, 4))).root
    *_, chunk, first, second = leaves(root)
    assert (first.role, second.role, chunk.shape) == ("output", "output", "2 × [batch, 4]")
    (net,) = [net for net in root.nets if net.value == chunk.first]
    assert net.ends == (first.first, second.first)


def test_counters_and_sizes_are_not_drawn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    names = [box.note or box.name for box in leaves(outline(gs.trace(model, torch.randn(2, 3, 5, 5))).root)]
    assert names == ["input", "conv2d", "batch_norm", "output"]


def test_a_model_that_branches_on_training_says_so() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 1 if self.training else self.a(x)

    drawn = outline(gs.trace(Branch(), torch.randn(2, 4)))
    assert any("drawn is evaluation" in note for note in drawn.notes)
    assert "add" not in [box.name for box in leaves(drawn.root)]


# Where it stands


def everything(box: Box) -> bool:
    return True


def check_places(placed: Placed) -> None:
    """Children are inside of their box and do not touch; lines start and end at boxes, and go down."""
    for child in placed.children:
        assert child.x >= 0 and child.x + child.width <= placed.width + 0.01
        assert child.y >= 0 and child.y + child.height <= placed.height
        check_places(child)
    for i, a in enumerate(placed.children):
        for b in placed.children[:i]:
            apart = (
                a.x >= b.x + b.width or b.x >= a.x + a.width or a.y >= b.y + b.height or b.y >= a.y + a.height
            )
            assert apart, (a.box.path, b.box.path)
    if placed.is_open:
        for net, way in zip(placed.box.nets, placed.ways, strict=True):
            heights = [float(y) for y in re.findall(r"(?:M\S+ |V|\S+ \S+ \S+ \S+ \S+ )(-?[\d.]+)", way)]
            assert heights, net
            for piece in way.split("M")[1:]:
                numbers = [float(number) for number in re.findall(r"-?[\d.]+", piece)]
                assert numbers[-1] >= numbers[1], "a line that goes up"


@pytest.mark.parametrize("name", ["drawn", "unet"])
@pytest.mark.parametrize("depth", [0, 1, 2, 99])
def test_boxes_do_not_overlap(name: str, depth: int, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(name).root
    check_places(place(root, open_boxes(root, depth, 0).__contains__))
    if depth == 99:
        check_places(place(root, everything))


def test_what_is_used_stands_above(unet: Outline) -> None:
    for box in unet.root.boxes():
        if box.children:
            rows = grid(box).rows
            row = {item: number for number, items in enumerate(rows) for item in items if item >= 0}
            assert sorted(row) == list(range(len(box.children)))
            assert all(
                row[net.start] < row[end] for net in box.nets if net.start is not None for end in net.ends
            )


def test_a_chain_is_a_straight_line() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    placed = place(outline(gs.trace(model, torch.randn(2, 4))).root, everything)
    assert len({child.x + child.width / 2 for child in placed.children}) == 1
    assert all("C" not in way for way in placed.ways)


def test_budget_and_depth_decide_what_is_open(drawn: Outline) -> None:
    assert open_boxes(drawn.root, None, 1) == {drawn.root}
    assert open_boxes(drawn.root, 0, 1000) == {drawn.root}
    one = open_boxes(drawn.root, 1, 0)
    assert {box.path for box in one} == {"", "twice", NASTY}


# The files


class Tags(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def nasty(part: gs.Partition) -> gs.Program:
    """The program with lines of code that look like markup."""
    for node in part.program.nodes():
        source = node.meta.get("source")
        if isinstance(source, Source) and source.code:
            node.meta["source"] = replace(source, code=f"{NASTY}\x00\ud800")
    return replace(part.program, name=NASTY)


def test_text_is_never_markup() -> None:
    divided = gs.partition(Net(), torch.randint(0, 11, (2, 5)), k=2)
    drawn = outline(nasty(divided), ByWidth(divided.analysis))
    tree = ET.fromstring(figure(drawn))
    assert {element.tag.split("}")[1] for element in tree.iter()} <= {
        *("svg", "style", "rect", "text", "tspan", "g", "path", "title")
    }
    assert NASTY in [element.text for element in tree.iter()]
    found = Tags(page(drawn))
    names = [tag for tag, _ in found.tags]
    assert names.count("script") == 2 and "b" not in names
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert any(NASTY in text for text in found.texts)
    assert NASTY not in page(drawn)


@pytest.mark.parametrize("draw", [figure, page])
def test_equal_models_give_equal_bytes(draw: object) -> None:
    def text() -> str:
        torch.manual_seed(0)
        divided = gs.partition(Net(), torch.randint(0, 11, (2, 5)), k=2)
        return draw(outline(*divided.drawn()))  # type: ignore[operator,no-any-return]

    assert text() == text()


def test_nothing_is_fetched(drawn: Outline) -> None:
    for text in (figure(drawn), page(drawn)):
        assert set(re.findall(r"https?://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"(src|href)=|@import|url\(", text)
    assert "default-src 'none'" in page(drawn)


def test_parts_have_numbers_beside_colours(part: gs.Partition) -> None:
    divided = gs.partition(part.program, k=4)
    text = page(outline(*divided.drawn()))
    for number in range(4):
        assert f">{number}</text>" in text and colour(number) in text
    assert len({colour(number) for number in range(64)}) == 64
    for word in ("split: each", "apart: each", "mean: the", ">mean<", ">all<"):
        assert word in text
    assert "divided by width into 4 sub-models" in text


def test_the_script_gets_every_box(drawn: Outline) -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page(drawn))
    assert found is not None and "<" not in found[1]
    entries = json.loads(found[1])["boxes"]
    assert [entry[0] for entry in entries] == [box.role for box in drawn.root.boxes()]
    assert [entry[1].split("\n") for entry in entries] == [
        "\n".join(box.details).split("\n") for box in drawn.root.boxes()
    ]
    # What is not in the page from the start comes from the data.
    closed = [entry for entry in entries if len(entry) > 2 and entry[-1] is not None]
    start = page(drawn).count('<g class="box ')
    assert start + sum(entry[-1].count('<g class="box ') for entry in closed) == len(entries) > start


def test_several_that_are_alike_are_shown_by_the_first(drawn: Outline) -> None:
    text = figure(drawn)
    assert "first of 4 alike" in text and "blocks.0.up" in text and "blocks.1.up" not in text


def test_draw_writes_by_suffix(part: gs.Partition, tmp_path: Path) -> None:
    gs.draw(part, tmp_path / "a.svg")
    gs.draw(part.program, str(tmp_path / "b.html"), depth=1)
    gs.draw(gs.partition(Block(4), torch.randn(2, 4), k=1).submodels[0], tmp_path / "c.HTML")
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    assert all((tmp_path / name).read_text().startswith("<!DOCTYPE html>") for name in ("b.html", "c.HTML"))


def test_draw_refuses(part: gs.Partition, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither \.svg nor \.html"):
        gs.draw(part, tmp_path / "a.png")
    with pytest.raises(UserError, match="depth of the figure is -1"):
        gs.draw(part, tmp_path / "a.svg", depth=-1)
    with pytest.raises(BundleError, match="cannot be written"):
        gs.draw(part, tmp_path / "no" / "a.svg")
    assert not list(tmp_path.iterdir())


def test_notebooks_show_a_small_figure(part: gs.Partition) -> None:
    for shown in (part._repr_html_(), part.program._repr_html_()):
        tree = ET.fromstring(shown)
        assert tree.tag == "div" and tree[0].tag.endswith("svg")
        assert len(shown) < 100_000


# The browser


def browse(text: str, folder: Path) -> str:
    """The page as it is when the browser has loaded it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    (folder / "page.html").write_text(text)
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         "--dump-dom", (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
def test_the_policy_lets_the_script_run_and_nothing_else(drawn: Outline, tmp_path: Path) -> None:
    shown = browse(
        page(drawn).replace("</body>", "<script>document.title = 'other'</script></body>"), tmp_path
    )
    assert 'aria-expanded="false"' in shown and "aria-expanded" not in page(drawn).split("<script>")[0]
    assert "<title>Net</title>" in shown


@pytest.mark.slow
def test_the_script_places_boxes_as_the_file_does(drawn: Outline, tmp_path: Path) -> None:
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page(drawn))
    text = text.replace("</body>", '<script>document.getElementById("open").click()</script></body>')
    shown = browse(text, tmp_path)
    placed = place(drawn.root, everything)
    placed.x = placed.y = PAD

    def numbers(text: str) -> list[float]:
        text = text.split("</svg>")[0]
        places = re.findall(r'<g class="box [^>]*transform="translate\(([^)]*)\)|<path [^>]*d="([^"]*)', text)
        return [float(number) for pair in places for number in re.findall(r"-?\d+\.?\d*", "".join(pair))]

    wanted = numbers("".join(drawing(placed, details=False)))
    assert len(wanted) > 300
    assert numbers(shown) == pytest.approx(wanted, abs=0.11)


def test_groups_and_critics_have_their_colours() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    local = gs.local_critics(model, torch.randn(4, 6), at=["2", "4"])
    drawn = outline(*local.drawn())
    groups = [program.parameter_count() for program in local.groups.programs]
    critics = [local.critic_program(number).parameter_count() for number in range(2)]
    assert drawn.held == (groups[0] + critics[0], groups[1] + critics[1], groups[2])
    assert drawn.parameters == sum(groups) + sum(critics)
    (critic,) = find(drawn.root, "critic_1.0")
    assert [(band.look, band.shares) for band in critic.bands] == [("critic", (0.0, 1.0, 0.0))]
    assert f"{critics[1]:,} in group 1" in "\n".join(critic.details)
    (linear,) = find(drawn.root, "4")
    assert [(band.look, band.shares) for band in linear.bands] == [("group", (0.0, 0.0, 1.0))]
    assert [box.name for box in leaves(drawn.root) if box.role == "output"][1:] == [
        "scores of critic 0", "scores of critic 1"
    ]  # fmt: skip
    text = page(drawn)
    assert "<h2>Groups</h2>" in text and LOOKS["critic"] in text


def test_groups_with_a_flag_of_training_are_drawn() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    model(torch.randn(2, 1, 8, 8))
    drawn = outline(*gs.local_critics(model, torch.randn(2, 1, 8, 8), at=["3"]).drawn())
    assert drawn.k == 2 and sum(drawn.held) == drawn.parameters


def test_layer_groups_are_drawn_without_critics(tmp_path: Path) -> None:
    groups = gs.layer_groups(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), at=["2"]
    )
    gs.draw(groups, tmp_path / "net.html")
    text = (tmp_path / "net.html").read_text()
    assert (
        "divided by depth into 2 layer groups" in text
        and "critic" not in text.split("</header>")[1].split("<script")[0]
    )
    assert "<svg" in groups._repr_html_()
