"""Configuration: which source wins, and that every complaint names its source."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from p2pool.config import OPTIONS, Config, load_config
from p2pool.errors import ConfigError
from sharechain.params import NETWORKS

BASE = {"XDG_DATA_HOME": "/data"}


def written(path: Path, text: str) -> Path:
    file = path / "p2pool.toml"
    file.write_text(text)
    return file


def load(file: Path | None = None, *, environment: dict[str, str] | None = None, **flags: object) -> Config:
    return load_config(flags, BASE if environment is None else environment, file)


A = "/ip4/8.8.8.8/tcp/9338/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
B = "/dns/node.example.org/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"

#: For each option: what a flag, a variable and the file say, and what comes of it.
VALUES: dict[str, tuple[object, str, str, tuple[object, object, object]]] = {
    "network": ("regtest", "signet", '"testnet4"', ("regtest", "signet", "testnet4")),
    "data_dir": ("/a", "/b", '"/c"', (Path("/a"), Path("/b"), Path("/c"))),
    "bitcoind": (("a", "http://u:p@b:1"), "c d:2", '["e"]', (("a", "http://u:p@b:1"), ("c", "d:2"), ("e",))),
    "cookie_file": ("/a", "/b", '"/c"', (Path("/a"), Path("/b"), Path("/c"))),
    "rpc_user": ("one", "two", '"three"', ("one", "two", "three")),
    "rpc_password": ("one", "two", '"three"', ("one", "two", "three")),
    "zmq": (
        ("tcp://a:1",),
        "tcp://a:1,ipc:///b",
        '["tcp://c:2"]',
        (("tcp://a:1",), ("tcp://a:1", "ipc:///b"), ("tcp://c:2",)),
    ),
    "address": ("one", "two", '"three"', ("one", "two", "three")),
    "stratum_host": ("1.1.1.1", "::1", '"0.0.0.0"', ("1.1.1.1", "::1", "0.0.0.0")),
    "stratum_port": ("1", "2", "3", (1, 2, 3)),
    "vardiff_interval": ("1", "2.5", "3", (1.0, 2.5, 3.0)),
    "start_difficulty": ("1", "0.5", "1e6", (1.0, 0.5, 1e6)),
    "stratum_listen": (
        ("[::]:1+0.5", "a:2"),
        "0.0.0.0:3334+65536, a:2",
        '["a:2"]',
        ((("::", 1, 0.5), ("a", 2, None)), (("0.0.0.0", 3334, 65536.0), ("a", 2, None)), (("a", 2, None),)),
    ),
    "stratum_tls": (
        ("/a/c.pem", "/a/k.pem"),
        "/b/c.pem,/b/k.pem",
        '["/c/c.pem", "/c/k.pem"]',
        tuple((Path(f"/{name}/c.pem"), Path(f"/{name}/k.pem")) for name in "abc"),  # type: ignore[dict-item]
    ),
    "stratum_proxy": (
        ("10.0.0.0/8", "::1"),
        "10.0.0.0/8,::1",
        '["192.0.2.1"]',
        (
            (ip_network("10.0.0.0/8"), ip_network("::1/128")),
            (ip_network("10.0.0.0/8"), ip_network("::1/128")),
            (ip_network("192.0.2.1/32"),),
        ),
    ),
    "stratum_max_per_ip": ("1", "2", "3", (1, 2, 3)),
    "payout_class": (
        ("Antminer S19=47", "12"),
        "x=y=146",
        "367",
        ((("Antminer S19", 47), ("", 12)), (("x=y", 146),), (("", 367),)),
    ),
    "shares_per_window": ("1", "2", "0", (1, 2, 0)),
    "peer": ((A, B), f"{A},{B}", f'["{B}"]', ((A, B), (A, B), (B,))),
    "p2p_host": ("1.1.1.1", "::1", '"127.0.0.1"', ("1.1.1.1", "::1", "127.0.0.1")),
    "p2p_port": ("1", "2", "3", (1, 2, 3)),
    "mdns": (True, "yes", "true", (True, True, True)),
    "max_inbound": ("1", "2", "3", (1, 2, 3)),
    "max_outbound": ("1", "2", "3", (1, 2, 3)),
    "log_level": ("debug", "warning", '"error"', ("debug", "warning", "error")),
}


def test_every_option_is_in_the_table_of_this_test() -> None:
    assert set(VALUES) == {option.name for option in OPTIONS}


@pytest.mark.parametrize("name", list(VALUES))
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(name: str, tmp_path: Path) -> None:
    flag, variable, toml, (by_flag, by_variable, by_file) = VALUES[name]
    file = written(tmp_path, f"{name} = {toml}\n")
    environment = {**BASE, "P2POOL_" + name.upper(): variable}
    assert getattr(load(file, environment=environment, **{name: flag}), name) == by_flag
    assert getattr(load(file, environment=environment, **{name: None}), name) == by_variable
    assert getattr(load(file), name) == by_file
    assert load() == load(written(tmp_path, ""))


def test_the_defaults() -> None:
    config = load()
    assert config == Config(
        network="mainnet",
        params=NETWORKS["mainnet"],
        data_dir=Path("/data/p2pool/mainnet"),
        bitcoind=(),
        cookie_file=None,
        rpc_user=None,
        rpc_password=None,
        zmq=(),
        address=None,
        stratum_host="127.0.0.1",
        stratum_port=3333,
        vardiff_interval=5.0,
        start_difficulty=512.0,
        stratum_listen=(),
        stratum_tls=None,
        stratum_proxy=(),
        stratum_max_per_ip=5000,
        payout_class=(),
        shares_per_window=200,
        peer=(),
        p2p_host="0.0.0.0",
        p2p_port=9338,
        mdns=False,
        max_inbound=64,
        max_outbound=8,
        log_level="info",
    )


def test_the_data_directory_follows_the_network_and_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(network="signet").data_dir == Path("/data/p2pool/signet")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(environment={}).data_dir == Path("/home/somebody/.local/share/p2pool/mainnet")
    assert load(environment={"XDG_DATA_HOME": ""}).data_dir == Path("/home/somebody/.local/share/p2pool/mainnet")
    assert load(data_dir="~/here").data_dir == Path("/home/somebody/here")
    file = written(tmp_path, 'network = "regtest"\n[params]\nname = "mine"\n')
    assert load(file).data_dir == Path("/data/p2pool/mine")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", "main"),
        ("stratum_port", "65536"),
        ("bitcoind", ("http://",)),
        ("bitcoind", ("ftp://127.0.0.1",)),
        ("bitcoind", ("127.0.0.1:99999",)),
        ("zmq", ("127.0.0.1:28332",)),
        ("stratum_port", "-1"),
        ("stratum_port", "\N{SUPERSCRIPT TWO}"),
        ("stratum_port", ""),
        ("stratum_port", "9" * 5000),
        ("start_difficulty", "0"),
        ("start_difficulty", "nan"),
        ("start_difficulty", "hard"),
        ("stratum_listen", "3334"),
        ("stratum_listen", ":3334"),
        ("stratum_listen", "a:b"),
        ("stratum_listen", "a:3334+x"),
        ("stratum_listen", "a:0+5"),
        ("stratum_tls", "only.pem"),
        ("stratum_proxy", "balancer"),
        ("stratum_proxy", "10.0.0.1/8"),
        ("stratum_max_per_ip", "-1"),
        ("payout_class", "S19"),
        ("payout_class", "S19=many"),
        ("shares_per_window", "1.5"),
        ("peer", "192.168.0.1:9338"),
        ("peer", "/ip4/8.8.8.8/tcp/9338"),
        ("max_inbound", "1001"),
        ("max_outbound", "-1"),
        ("mdns", "maybe"),
        ("vardiff_interval", "0"),
        ("vardiff_interval", "nan"),
        ("vardiff_interval", "inf"),
        ("vardiff_interval", "soon"),
        ("log_level", "loud"),
        ("log_level", "INFO"),
        ("address", ""),
        ("data_dir", ""),
        ("data_dir", "~nobody-of-that-name/x"),
    ],
)
def test_a_bad_value_is_refused_by_flag_and_by_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: "):
        load_config({name: value}, BASE, None)
    with pytest.raises(ConfigError, match=f"^P2POOL_{name.upper()}: "):
        load(environment={**BASE, "P2POOL_" + name.upper(): value})


@pytest.mark.parametrize(
    ("name", "toml"),
    [
        ("network", "1"),
        ("network", '"main"'),
        ("stratum_port", "true"),
        ("stratum_port", "3.5"),
        ("stratum_port", "70000"),
        ("stratum_port", "[1]"),
        ("vardiff_interval", "true"),
        ("vardiff_interval", '"x"'),
        ("vardiff_interval", "inf"),
        ("start_difficulty", "true"),
        ("stratum_listen", "3334"),
        ("stratum_listen", "[3334]"),
        ("stratum_tls", '["a", "b", "c"]'),
        ("payout_class", "true"),
        ("log_level", "{}"),
        ("address", "5"),
        ("data_dir", "false"),
        ("data_dir", '"~nobody-of-that-name/x"'),
    ],
)
def test_a_bad_value_in_the_file_is_refused_with_its_line(name: str, toml: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"# a comment\n\n{name} = {toml}\n")
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert str(refused.value).startswith(f"{file}:3: {name}: ")


def test_an_unknown_key_is_refused_with_its_line_and_the_known_ones(tmp_path: Path) -> None:
    file = written(tmp_path, 'network = "regtest"\nstratum-port = 1\n')
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert str(refused.value).startswith(f"{file}:2: stratum-port: unknown option; known are address, bitcoind, ")


@pytest.mark.parametrize(
    ("text", "line"),
    [("network = \n", 1), ("\n\nnetwork regtest\n", 3), ('a = 1\na = "x', 2), ("[params\n", 1), ("x = {\n", 2)],
)
def test_what_is_not_toml_is_refused_with_its_line(text: str, line: int, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load(file)
    shown = str(refused.value)
    assert shown.startswith(f"{file}:"), shown
    assert abs(int(shown.removeprefix(f"{file}:").partition(":")[0]) - line) <= 1, shown


def test_a_file_that_does_not_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config: .*nothing.toml: No such file"):
        load(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match=r"^--config: .*: Is a directory"):
        load(tmp_path)
    file = tmp_path / "latin.toml"
    file.write_bytes(b'address = "\xe9"\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(file)


def test_a_private_network_overrides_parameters(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        'network = "regtest"\n[params]\nname = "mine"\nshare_period_ms = 500\nmax_target = "ff00"\n'
        "uncle_weight = [1, 2]\npayout_classes = [2, 5]\n",
    )
    params = load(file).params
    assert params.name == "mine"
    assert params.share_period_ms == 500
    assert params.max_target == 0xFF00
    assert params.uncle_weight == (1, 2)
    assert params.payout_classes == (2, 5)
    assert params.network_id != NETWORKS["regtest"].network_id


@pytest.mark.parametrize(
    ("table", "line", "text"),
    [
        ('name = "mine"\nshare_period_ms = 0', 3, "share_period_ms: an integer from 1"),
        ('name = "mine"\n\nmax_target = "xyz"', 4, "max_target: "),
        ('name = "mine"\nnonsense = 1', 3, "nonsense: unknown parameter"),
        ("share_period_ms = 5", 1, "a name of its own"),
        ('name = ""', 2, "name: "),
        ('name = "mine"\nuncle_weight = [3, 2]', 3, "uncle_weight: "),
        ('name = "mine"\npayout_classes = 5', 3, "payout_classes: "),
        ('name = "mine"\nbitcoin_network = "moon"', 3, "bitcoin_network: "),
    ],
)
def test_a_bad_parameter_is_refused_with_its_line(table: str, line: int, text: str, tmp_path: Path) -> None:
    file = written(tmp_path, f"[params]\n{table}\n")
    with pytest.raises(ConfigError) as refused:
        load(file)
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert text in str(refused.value)


def test_params_must_be_a_table(tmp_path: Path) -> None:
    file = written(tmp_path, "params = 5\n")
    with pytest.raises(ConfigError, match=":1: params: a table is needed"):
        load(file)


@pytest.mark.parametrize("name", ["", 'name = "regtest"', 'name = "mainnet"'])
def test_a_private_network_has_a_name_that_no_known_network_has(tmp_path: Path, name: str) -> None:
    """Two networks of one name would share a directory, and their operators an error that says nothing."""
    file = tmp_path / "p2pool.toml"
    file.write_text(f'network = "regtest"\n[params]\n{name}\nmin_payout = 20000\n')
    with pytest.raises(ConfigError, match=r"p2pool.toml:2: params: .* name of its own"):
        load_config({}, {}, file)


def test_a_complaint_about_a_bitcoin_node_and_the_configuration_as_text_show_no_password() -> None:
    secret = "hunter2"
    with pytest.raises(ConfigError) as complaint:
        load(bitcoind=(f"http://user:{secret}@bad host:1",))
    assert str(complaint.value).startswith("--bitcoind: ")
    assert secret not in str(complaint.value)
    config = load(bitcoind=(f"http://user:{secret}@127.0.0.1",), rpc_password=secret)
    assert secret not in repr(config)
