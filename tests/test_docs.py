"""The documentation stays true: what it lists is what the code has, and where it points to there is something."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from p2pool.cli import cli
from p2pool.config import OPTIONS
from p2pool.report import EXPORT_FIELDS, share_row
from sharechain.chain import Sharechain
from sharechain.params import NETWORKS, Params
from sharechain.share import decode_share, share_commitment
from sharechain.store import StoredShare
from tests.builders import PARAMS, add, grow, mine, new_chain

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    ]
)
REFERENCE = ROOT / "docs" / "reference"
#: First parts of paths of the repository: what starts with one of them in backticks is taken for a path.
TOP_LEVEL = ("sharechain/", "p2pool/", "tests/", "docs/", "contrib/")
#: The directory of a data directory that is called like a package.
NO_PATHS = {"p2pool/NETWORK", "sharechain/"}


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def table_rows(text: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell; the first of equals."""
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0], cells[1:])
    return rows


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_each_option_is_in_the_configuration_page_with_its_default(option: object) -> None:
    assert option in OPTIONS
    found = next(one for one in OPTIONS if one is option)
    row = table_rows(page("config.md")).get(f"`{found.flag}`")
    assert row is not None, f"{found.flag} has no row in config.md"
    assert f"`{found.variable}`" in row[0]
    assert f"`{found.name}`" in row[0]
    assert row[1] == f"`{found.default}`" if found.default is not None else row[1].startswith("none")


def test_the_configuration_page_has_no_other_options() -> None:
    flags = {name.strip("`") for name in table_rows(page("config.md")) if name.startswith("`--")}
    assert flags == {option.flag for option in OPTIONS}


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_each_command_and_flag_is_in_the_command_page(name: str) -> None:
    sections = re.split(r"^## ", page("cli.md"), flags=re.MULTILINE)
    section = next((text for text in sections if re.match(rf"`p2pool {name}( [A-Z:]+)?`\n", text)), None)
    assert section is not None, f"p2pool {name} has no section in cli.md"
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert f"`{parameter.opts[0]}`" in section, f"p2pool {name} {parameter.opts[0]} is not in its section"
    named = set(re.findall(r"`(--[a-z-]+)`", section))
    assert named <= {flag for parameter in cli.commands[name].params for flag in parameter.opts}


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_each_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{relative(path)}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{relative(path)}: there is no heading for {target}"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_each_path_named_exists(path: Path) -> None:
    for name in re.findall(r"`([^`\s]+)`", without_code(path.read_text(encoding="utf-8"))):
        if name.startswith(TOP_LEVEL) and name not in NO_PATHS:
            assert (ROOT / name).exists(), f"{relative(path)}: there is no {name}"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_each_test_and_function_named_exists(path: Path) -> None:
    text = without_code(path.read_text(encoding="utf-8"))
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{relative(path)}: there is no test {name}"
    # `file.py`: `name`, `Class.method`, ...
    for file, names in re.findall(r"`((?:sharechain|p2pool)/[\w/]+\.py)`:((?:\s+`[A-Za-z_][\w.]*`,?)+)", text):
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.split(".")[-1]
            assert re.search(rf"(def|class) {last}\b|^{last}\b", code, re.MULTILINE), f"{file} has no {name}"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages_stand_alone(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        assert (path.parent / target).resolve().is_relative_to(ROOT), f"{target} is outside the repository"


@pytest.mark.parametrize("number", range(1, 13))
def test_each_rule_has_a_section_that_names_its_code_and_tests(number: int) -> None:
    found = re.search(rf"^### R{number} .+?(?=^##)", page("rules.md"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"R{number} has no section"
    for part in ("**Statement.**", "**Reason.**", "**Code.**", "**Tests.**"):
        assert part in found[0], f"R{number} has no {part}"
    tests = set(re.findall(r"`(test_r\d+_\w+)`", found[0]))
    assert tests, f"R{number} names no test"
    code = (ROOT / "tests" / "sharechain" / "test_rules.py").read_text(encoding="utf-8")
    assert tests == set(re.findall(rf"^def (test_r{number}_\w+)\(", code, re.MULTILINE))


def shown(value: object) -> str:
    """A parameter as the page writes it."""
    if isinstance(value, int) and value > 2**64:
        return f"2^{value.bit_length()} - 1"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)
    return f"`{value}`"


@pytest.mark.parametrize("name", [field.name for field in fields(Params)])
def test_each_parameter_is_in_the_rules_with_its_values(name: str) -> None:
    text = page("rules.md")
    value = getattr(NETWORKS["mainnet"], name)
    row = table_rows(text).get(f"`{name}`")
    assert row is not None, f"{name} is not in rules.md"
    fraction = name in ("uncle_weight", "finder_bonus")
    assert row[0] == (f"{value[0]}/{value[1]}" if fraction else shown(value))
    if name in ("name", "bitcoin_network"):
        return
    others = re.search(r"^\| parameter \| testnet4 .+?\n\n", text, re.MULTILINE | re.DOTALL)
    assert others is not None
    changed = next((cells for key, cells in table_rows(others[0]).items() if f"`{name}`" in key), None)
    for column, network in enumerate(("testnet4", "signet", "regtest")):
        theirs = getattr(NETWORKS[network], name)
        if changed is None:
            assert theirs == value, f"{name} of {network} is not in rules.md"
        else:
            assert shown(theirs) in changed[column].split(", "), f"{name} of {network}"


@pytest.mark.parametrize("name", list(NETWORKS))
def test_network_ids_are_in_the_rules(name: str) -> None:
    assert f"| {name} | `{NETWORKS[name].network_id.hex()}` |" in page("rules.md")


def test_parameters_stand_in_the_order_of_their_encoding() -> None:
    rows = [key.strip("`") for key in table_rows(page("rules.md"))]
    names = [field.name for field in fields(Params)]
    assert [key for key in rows if key in names] == names


def test_each_export_field_is_documented_in_order() -> None:
    table = page("share.md").split("## Export")[1]
    named = [name for key in table_rows(table) for name in re.findall(r"`(\w+)`", key)]
    assert named == list(EXPORT_FIELDS)


def rows_of(chain: Sharechain, shares: list[StoredShare]) -> str:
    return "".join(json.dumps(share_row(chain, stored)) + "\n" for stored in shares)


def test_the_annotated_share_decodes_to_the_one_that_is_named() -> None:
    section = page("share.md").split("## A real one")[1].split("## Export")[0]
    layout = re.search(r"^```text\n(.+?)^```", section, re.MULTILINE | re.DOTALL)
    assert layout is not None
    columns = [re.split(r"\s{3,}", line.strip())[0] for line in layout[1].splitlines()]
    raw = bytes.fromhex("".join("".join(columns).split()))
    share = decode_share(raw)
    assert f'"hash": "{share.hash[::-1].hex()}"' in section
    assert f"`{share_commitment(bytes.fromhex('d4ceb7754e8ca6ea'), share.data).hex()}`" in section


def test_the_recipe_recomputes_exact_and_drawn_payouts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the program of rules.md as it stands there, on shares with uncles, cut windows, lots and a witness."""
    program = re.search(r"^```python\n(.+?)^```", page("rules.md"), re.MULTILINE | re.DOTALL)
    assert program is not None
    params = PARAMS.with_overrides(
        {"window_max_shares": 2_000, "payout_classes": [2, 3, 12], "block_target_divisor": 7}
    )
    chain = new_chain(params)
    shares = grow(chain, 10, miners=9)
    for number in range(40):
        tip = chain.tip
        assert tip is not None
        uncles = chain.uncle_candidates(tip)
        for salt in range(1 + (number % 4 == 0)):  # the second is an uncle of the next but one
            share = mine(
                chain,
                tip,
                miner=number + 4 * salt,
                uncles=uncles,
                payout_class=(2, 3, 12)[number % 3],
                value=(5_000_000_000, 3_000_001, 30_000, 700)[number % 4],
                witness_commitment=bytes([number]) * 32 if number % 2 else None,
                branch=(bytes([number]) * 32,) * (number % 3),
                salt=number + 1000 * salt,
            )
            add(chain, share)
            shares.append(share)
    assert any(entry.uncles for entry in chain.entries()), "the test wants uncles"
    assert len(chain.window_at(chain.tip, 56).table) > 3, "the test wants more miners than a coinbase of class 2 pays"
    text = rows_of(chain, [StoredShare(share=share, first_seen_ms=0) for share in shares])
    monkeypatch.setattr(sys, "argv", ["recompute.py", "7"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    exec(compile(program[1], "rules.md", "exec"), {"__name__": "__main__"})  # noqa: S102
    assert capsys.readouterr().out.startswith(f"{len(shares)} of {len(shares)} coinbases recomputed")


@pytest.mark.parametrize("package", ["sharechain", "p2pool"])
def test_each_file_has_its_row_in_the_architecture(package: str) -> None:
    text = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    rows = table_rows(text)
    for file in (ROOT / package).glob("*.py"):
        if file.stem != "__init__":
            assert any(key.startswith(f"`{relative(file)}`") for key in rows), f"{relative(file)} has no row"
    for file in (ROOT / package).glob("*/*.py"):
        row = rows.get(f"`{relative(file.parent)}/`")
        assert row is not None, f"{relative(file.parent)}/ has no row"
        assert file.stem == "__init__" or file.name in row[0], f"{relative(file)} is not in the row of its directory"
