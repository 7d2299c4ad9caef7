"""The package rollout/ without a server: arguments, buckets, checksums, answers, logs."""

import errno
import fcntl
import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import orjson
import psutil
import pytest
import torch

from megatron_egrsd.config import EvaluationConfig, ModelConfig, RolloutConfig, ServersConfig
from megatron_egrsd.errors import BadArgument, RunError
from megatron_egrsd.rollout import client as client_module
from megatron_egrsd.rollout import generation
from megatron_egrsd.rollout.client import RolloutClient
from megatron_egrsd.rollout.generation import NOTHING, Generation, parse_generation, read_answer, read_apart
from megatron_egrsd.rollout.ports import choose_ports
from megatron_egrsd.rollout.process_group import address_towards, is_local, use_sglangs_nccl_settings
from megatron_egrsd.rollout.scratch import SHARED_LIST, Scratch
from megatron_egrsd.rollout.server_command import server_command
from megatron_egrsd.rollout.servers import RolloutServers, Server, last_error
from megatron_egrsd.rollout.transports import Disk, buckets
from megatron_egrsd.rollout.weight_checksums import checksum, expected_checksums
from tests.processes import is_running, kill, kill_tree, tree

MODEL = ModelConfig("/models/tiny", "float32")


def test_server_args_override_and_bare_flags():
    config = ServersConfig(args={"mem_fraction_static": 0.5, "random-seed": 9, "skip-server-warmup": False,
                                        "enable_metrics": True, "cuda_graph_bs": [1, 2]})  # fmt: skip
    words = server_command(config, MODEL, 3, 1234, "cuda")
    assert words[words.index("--mem-fraction-static") + 1] == "0.5"
    assert ServersConfig(args={"mem-fraction-static": 0.5}).args == {"mem_fraction_static": 0.5}
    assert words.count("--random-seed") == 1
    assert words[words.index("--random-seed") + 1] == "9"
    assert "--skip-server-warmup" not in words
    assert "--enable-metrics" in words
    assert words[words.index("--cuda-graph-bs") + 1 :][:2] == ["1", "2"]
    assert "--device" not in words
    assert "--max-total-tokens" not in words


def test_nccl_works_as_in_sglang_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "")  # so that it is restored
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")
    use_sglangs_nccl_settings()
    assert (os.environ["NCCL_CUMEM_ENABLE"], os.environ["NCCL_NVLS_ENABLE"]) == ("0", "1")


def test_addresses_of_this_host_are_local(monkeypatch):
    hosts, resolve = {"debian": "127.0.1.1", "elsewhere": "203.0.113.7"}, socket.getaddrinfo

    def getaddrinfo(host, *arguments, **more):
        if host == "nowhere":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(hosts.get(host, host), *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "debian", "[::1]", "[::]"):
        assert is_local(f"http://{host}:30000")
    assert address_towards("http://debian") == "127.0.0.1"
    if Path("/proc/net/if_inet6").is_file():  # this host has IPv6
        assert address_towards("http://[::1]:30000") == "::1"
    with pytest.raises(RunError, match="the host of http://nowhere:1 has no address: Name"):
        is_local("http://nowhere:1")
    monkeypatch.setattr("megatron_egrsd.rollout.process_group.address_towards", lambda _: "198.51.100.1")
    assert is_local("http://198.51.100.1:1") and not is_local("http://elsewhere:30000")


def test_a_bf16_model_has_an_fp32_head():
    bf16 = ModelConfig("/models/tiny", "bfloat16")
    assert "--enable-fp32-lm-head" in server_command(ServersConfig(), bf16, 0, 1234, "cuda")
    assert "--enable-fp32-lm-head" not in server_command(ServersConfig(), MODEL, 0, 1234, "cuda")
    without = ServersConfig(args={"enable_fp32_lm_head": False})
    assert "--enable-fp32-lm-head" not in server_command(without, bf16, 0, 1234, "cuda")


def test_cpu_arguments():
    words = server_command(ServersConfig(max_total_tokens=100), MODEL, 0, 1234, "cpu")
    assert words[words.index("--device") + 1] == "cpu"
    assert words[words.index("--max-total-tokens") + 1] == "100"


def test_what_a_failed_push_leaves_half_done_is_one_loss(tmp_path):
    config = ServersConfig(urls=["http://a:1", "http://b:1"], max_restarts=2)
    servers = RolloutServers(config, MODEL, 0, tmp_path, wait=False)
    servers.attach(["http://c:1", "http://d:1"])
    servers.mark_lost(servers.servers[2:3], "c hangs")
    assert servers.restarts == 1 and servers.take_due() == ["http://c:1"]
    servers.mark_all_lost("the push failed")
    assert servers.restarts == 2 and servers.live == [] and servers.take_due() == ["http://d:1"]
    servers.mark_all_lost("nobody is left to lose")
    assert servers.restarts == 2 and servers.take_due() == []
    servers.rejoin()
    with pytest.raises(
        RunError, match=r"b hangs; the run gives up after 2 lost servers \(rollout.servers.max_restarts\)"
    ):
        servers.mark_lost(servers.servers[1:2], "b hangs")


def test_free_ports_are_free_and_no_connection_takes_them():
    outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = choose_ports("127.0.0.1", 0, 300)
    assert len(set(ports)) == 300 and max(ports) < outgoing
    taken = pytest.raises(BadArgument, match=f"port {ports[7]} on 127.0.0.1 cannot be used")
    with socket.create_server(("127.0.0.1", ports[7])), taken:
        choose_ports("127.0.0.1", ports[7] - 2, 4)
    with pytest.raises(BadArgument, match=r"port 80 on 203\.0\.113\.1 cannot be used"):
        choose_ports("203.0.113.1", 80, 1)  # an address that no host here has
    with pytest.raises(BadArgument, match=r"rollout\.servers\.host: no free port on 203\.0\.113\.1 \(Cannot assign"):
        choose_ports("203.0.113.1", 0, 1)


def test_buckets_keep_order_size_and_type():
    sizes = [(10, torch.float32), (10, torch.float32), (100, torch.float32), (4, torch.float32), (4, torch.bfloat16)]
    tensors = [(str(i), torch.zeros(n, dtype=dtype)) for i, (n, dtype) in enumerate(sizes)]
    grouped = list(buckets(iter(tensors), 80))
    assert [[name for name, _ in bucket] for bucket in grouped] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert list(buckets([], 80)) == []


def test_a_killed_push_over_the_disk_leaves_no_files_behind_the_next(tmp_path):
    (tmp_path / "weight-sync-killed").mkdir()
    (tmp_path / "weight-sync-killed" / "model-00000.safetensors").touch()
    seen = []
    control = SimpleNamespace(on_all=lambda endpoint, body: seen.extend(Path(body["model_path"]).iterdir()))
    Disk(control, 1 << 20, torch.device("cpu"), tmp_path).send([("w", torch.zeros(2))], 1)
    assert [path.name for path in seen] == ["model-00000.safetensors"] and not list(tmp_path.iterdir())


def test_checksum_is_of_the_bytes():
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3).t()  # not contiguous
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert checksum(tensor) == hashlib.sha256(raw).hexdigest()[:16]


@pytest.mark.parametrize("size", [1, 2])
def test_checksums_follow_sglangs_layout(size):
    torch.manual_seed(0)
    layer = "model.layers.0."
    sizes = {"self_attn.v_proj": (4, 8), "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8),
             "self_attn.o_proj": (8, 8), "mlp.up_proj": (6, 8), "mlp.gate_proj": (6, 8), "mlp.down_proj": (8, 6),
             "self_attn.q_norm": (4,)}  # fmt: skip
    tensors = {f"{layer}{module}.weight": torch.randn(shape) for module, shape in sizes.items()}
    tensors["model.embed_tokens.weight"] = torch.randn(61, 8)
    shards = [(rank, size) for rank in range(size)]
    found = {name: sums for name, _, sums in expected_checksums(tensors.items(), shards)}

    def part(module, rank, dim=0):
        return tensors[f"{layer}{module}.weight"].chunk(size, dim)[rank]

    for rank, _ in shards:
        want = {
            f"{layer}self_attn.qkv_proj.weight": torch.cat([part(f"self_attn.{m}_proj", rank) for m in "qkv"]),
            f"{layer}mlp.gate_up_proj.weight": torch.cat([part(f"mlp.{m}_proj", rank) for m in ("gate", "up")]),
            f"{layer}self_attn.o_proj.weight": part("self_attn.o_proj", rank, 1),
            f"{layer}mlp.down_proj.weight": part("mlp.down_proj", rank, 1),
            f"{layer}self_attn.q_norm.weight": tensors[f"{layer}self_attn.q_norm.weight"],
            "model.embed_tokens.weight": torch.cat(
                [tensors["model.embed_tokens.weight"], torch.zeros(3, 8)]
            ).chunk(size)[rank],
        }  # fmt: skip
        assert {name: sums[rank, size] for name, sums in found.items()} == {n: checksum(t) for n, t in want.items()}


def test_a_fused_tensor_without_one_part_matches_nothing():
    [(name, parts, sums)] = expected_checksums([("model.layers.0.mlp.up_proj.weight", torch.ones(2, 2))], [(0, 1)])
    assert name == "model.layers.0.mlp.gate_up_proj.weight"
    assert parts == ["model.layers.0.mlp.up_proj.weight"]
    assert sums == {(0, 1): "incomplete"}


def answer(**meta):
    return {"output_ids": [5, 2], "meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "3",
            "output_token_logprobs": [[-0.5, 5, None], [-0.25, 2, None]], **meta}}  # fmt: skip


def test_sglang_gets_the_sampling_parameters_of_the_settings():
    client = RolloutClient(None, RolloutConfig(temperature=0.9))
    whole = {"temperature": 0.9, "max_new_tokens": 5, "skip_special_tokens": False}
    assert client.sampling(client.config, 5) == whole
    stopping = RolloutClient(None, RolloutConfig(), [7])
    truncated = whole | {"temperature": 0.0, "top_p": 0.95, "top_k": 20, "stop_token_ids": [7]}
    assert stopping.sampling(EvaluationConfig(temperature=0.0, top_p=0.95, top_k=20), 5) == truncated


def test_parse_generation():
    generation = parse_generation(answer())
    assert (generation.response_ids, generation.log_probs) == ([5, 2], [-0.5, -0.25])
    assert (generation.finish_reason, generation.weight_version) == ("stop", 3)
    with pytest.raises(ValueError, match="aborted the generation: out of memory"):
        parse_generation(answer(finish_reason={"type": "abort", "message": "out of memory"}))
    with pytest.raises(ValueError, match="other tokens than it sampled"):
        parse_generation(answer(output_token_logprobs=[[-0.5, 5, None]]))
    assert parse_generation(answer(weight_version="default")).weight_version == -1


def test_beginnings_are_put_together():
    stopped = answer(finish_reason={"type": "abort", "message": "stopped"})
    first = parse_generation(stopped, stopping=True)
    assert (first.response_ids, first.log_probs, first.finished) == ([5], [-0.5], False)
    queued = {"output_ids": [], "meta_info": stopped["meta_info"] | {"output_token_logprobs": []}}
    assert parse_generation(queued, stopping=True) == NOTHING
    more = parse_generation(stopped | {"meta_info": stopped["meta_info"] | {"weight_version": "4"}}, stopping=True)
    whole = (
        NOTHING.continued(first)
        .continued(first)
        .continued(more)
        .continued(NOTHING)
        .continued(parse_generation(answer(weight_version="6")))
    )
    assert whole == Generation([5, 5, 5, 5, 2], [-0.5] * 4 + [-0.25], "stop", [[3, 2], [4, 1], [6, 2]])
    assert whole.weight_version == 3 and whole.finished


def test_log_probs_that_json_cannot_spell_are_nan():
    spoiled = answer(output_token_logprobs=[[None, 5, None], [-0.25, 2, None]])
    assert math.isnan(parse_generation(spoiled).log_probs[0])


@pytest.mark.heavy
def test_another_process_reads_the_same():
    """Several threads may call it, a ValueError is passed on, and if the process is killed, this process parses."""
    raw = [
        orjson.dumps(answer(weight_version=str(i), output_token_logprobs=[[None, 5], [-i / 7, 2]])) for i in range(9)
    ]
    with ThreadPoolExecutor(4) as threads:
        assert repr(list(threads.map(read_apart, raw))) == repr(list(map(read_answer, raw)))  # nan is not nan
    stopped = orjson.dumps(answer(finish_reason={"type": "abort", "message": "out of memory"}))
    assert read_apart(stopped, stopping=True).response_ids == [5]
    for bad, message in (
        (stopped, "aborted the generation: out of memory"),
        (b"{", "unexpected end"),
        (b"[]", "SGLang"),
    ):
        with pytest.raises(ValueError, match=message):
            read_apart(bad)
    first = generation._reader.process
    first.kill()
    first.wait()
    assert [read_apart(good).weight_version for good in raw] == list(range(9))
    assert generation._reader.process.pid != first.pid


@pytest.mark.heavy
def test_the_process_that_reads_ends_with_its_parent():
    """The parent may end in any way."""
    code = (
        "import os, signal; from megatron_egrsd.rollout import generation\n"
        "try: generation.read_apart(b'')\n"
        "except ValueError: print(generation._reader.process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=100).stdout)
    deadline = time.monotonic() + 20
    while any(process.pid == child and is_running(process) for process in tree(child)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_ends_between_two_looks_is_no_failure(tmp_path):
    with subprocess.Popen(["sleep", "100"]) as first:
        ended = psutil.Process(first.pid)
        kill_tree(first.pid)
    kill(ended)
    assert tree(ended.pid) == []
    (tmp_path / "log").write_text("Error: gone\n")
    server = Server("http://127.0.0.1:1")
    server.log, server.children = tmp_path / "log", [ended]
    with subprocess.Popen(["sleep", "100"]) as server.process:
        assert f"its process {ended.pid} is gone" in server.ended()
        server.process.kill()


def test_last_error_is_the_cause_not_a_consequence(tmp_path):
    log = tmp_path / "log"
    log.write_text("starting\nTraceback (most recent call last):\n  File x\nValueError: no such model\n"
                   "Traceback (most recent call last):\nRuntimeError: a child died\nbye\n")  # fmt: skip
    assert last_error(log) == "ValueError: no such model"
    taken = "[2026-11-24 01:42:56] ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 38701)"
    log.write_text(f"[2026-11-24 01:42:55] INFO:     up\n{taken}\nTimeoutError: timed out\n")
    assert last_error(log) == taken
    log.write_text("usage: x\nlaunch.py: error: argument --dtype: invalid choice: 'x'\n")
    assert last_error(log).endswith("invalid choice: 'x'")
    log.write_text("one\ntwo\n")
    assert last_error(log) == "two"
    log.write_text("")
    assert last_error(log) == "its log is empty"


@pytest.mark.heavy
def test_torch_side_needs_no_sglang():
    """The trainer's import of this package must not import SGLang, which takes seconds."""
    code = ("import sys, megatron_egrsd.rollout.client, megatron_egrsd.rollout.weight_sync; "
            "sys.exit('sglang' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


def test_requests_in_flight_are_counted_by_server_and_fit_the_limit_of_files(tmp_path, monkeypatch):
    """A shell's limit of 1,024 files is raised as far as needed; if it cannot be, fewer requests are sent."""
    config = ServersConfig(urls=["http://a:1", "http://b:1", "http://c:1"], max_concurrent_requests=600)
    client = RolloutClient(RolloutServers(config, MODEL, 0, tmp_path, wait=False), RolloutConfig(servers=config))
    limits = {}
    monkeypatch.setattr(client_module.resource, "setrlimit", lambda kind, values: limits.update({kind: values}))
    for soft, hard, slots, raised in [
        (1024, 65536, 1800, (2056, 65536)),
        (4096, 65536, 1800, None),
        (1024, 1024, 768, None),
        (512, 1024, 768, (1024, 1024)),
        (-1, -1, 1800, None),
    ]:
        limits.clear()
        monkeypatch.setattr(client_module.resource, "getrlimit", lambda kind, s=soft, h=hard: (s, h))
        assert client.slots()._value == slots
        assert limits == ({client_module.resource.RLIMIT_NOFILE: raised} if raised else {})


def test_shared_memory_that_appears_after_its_run_was_killed_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("megatron_egrsd.rollout.scratch._SHARED", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    killed = Scratch()
    (killed.path / SHARED_LIST).write_text("one\n")
    killed._lock_file.close()  # as the end of its process does
    following = Scratch()
    assert not killed.path.exists()
    (tmp_path / "shm" / "one").touch()
    following.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["shm"] and not list((tmp_path / "shm").iterdir())


def test_directories_that_only_bear_the_name_stay(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_egrsd.rollout.scratch._place", lambda: tmp_path)
    mine = [tmp_path / "megatron-egrsd-main" / "README.md", tmp_path / "megatron-egrsd-demo" / "shared" / "method.md"]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.touch()
    Scratch().remove()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)


def test_without_locks_servers_start_and_nothing_is_taken_for_abandoned(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("megatron_egrsd.rollout.scratch._place", lambda: tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    one, other = Scratch(), Scratch()
    assert one.path.exists()
    one.remove()
    other.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("length", "kept"), [(40, True), (79, False), (120, False)])
def test_the_names_of_sglangs_sockets_fit_into_any_tmpdir(length, kept, monkeypatch, tmp_path):
    """Slurm's scratch directories have long names, and a path of a socket has at most 107 characters."""
    place = Path("/tmp") / f"{os.getpid()}-".ljust(length - len("/tmp/"), "x")
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    try:
        scratch = Scratch()
        assert (scratch.path.parent == place) == kept
        assert len(str(scratch.path / "tmpabcdefgh")) <= 107
        scratch.remove()
        monkeypatch.setattr("megatron_egrsd.rollout.scratch._SHORT", tmp_path / "none")
        if not kept:
            with pytest.raises(BadArgument, match="TMPDIR is /tmp/"):
                Scratch()
    finally:
        shutil.rmtree(place)
