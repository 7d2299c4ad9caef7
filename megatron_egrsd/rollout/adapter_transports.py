"""Transports of an adapter to SGLang's own LoRA: handles to memory of this host, a temporary directory.

A server holds the adapter of one version, under the version's name, and every request asks for it by this name: SGLang
refuses a name that it does not hold, so no request is answered with an older adapter.
"""

import json
from typing import Any

from megatron_egrsd.rollout.tensor_handles import share
from megatron_egrsd.rollout.transports import Handles, NamedTensors, Transport
from megatron_egrsd.rollout.weight_checksums import tensor_sha256


class AdapterHandles(Handles):
    """Handles to memory of this host: the servers, on the same host, copy the tensors of the adapter themselves.

    Args:
        adapter: Content of adapter_config.json.
        check: Let the servers compare the SHA-256 of every tensor that they have copied. One that differs ends.
    """

    def __init__(self, *args, adapter: dict[str, Any], check: bool):
        super().__init__(*args)
        self.adapter, self.check = adapter, check

    def send(self, named_tensors: NamedTensors, version: int) -> str:
        bucket = list(named_tensors)
        handles, _buffer = share(bucket, self.device, dict)  # the buffer lives until all servers have copied it
        body = {"lora_name": f"version-{version}", "config_dict": self.adapter}
        if self.check:
            body["expected_checksums"] = {name: tensor_sha256(tensor) for name, tensor in bucket}
        # Every tensor-parallel rank opens the same tensors and keeps its part of them.
        bodies = [body | {"serialized_named_tensors": [handles] * size} for size in self._sizes]
        return _replace(self, "load_lora_adapter_from_tensors", bodies)


class AdapterDisk(Transport):
    """A temporary directory in PEFT's format, which the servers read; they must see it."""

    def __init__(self, *args, adapter: dict[str, Any], check: bool):
        super().__init__(*args)
        self.adapter = adapter

    def send(self, named_tensors: NamedTensors, version: int) -> str:
        from safetensors.torch import save_file

        with self._temporary_directory() as directory:
            tensors = {name: t.detach().cpu().contiguous() for name, t in named_tensors}
            save_file(tensors, f"{directory}/adapter_model.safetensors", {"format": "pt"})
            with open(f"{directory}/adapter_config.json", "w", encoding="utf-8") as file:
                json.dump(self.adapter, file)
            body = {"lora_name": f"version-{version}", "lora_path": directory}
            return _replace(self, "load_lora_adapter", [body] * len(self.control.urls))


ADAPTER_TRANSPORTS: dict[str, type[AdapterHandles] | type[AdapterDisk]] = {"ipc": AdapterHandles, "disk": AdapterDisk}


def _replace(transport: Transport, endpoint: str, bodies: list[dict[str, Any]]) -> str:
    """Load an adapter, one body a server, and unload those before it; returns its name."""
    name = bodies[0]["lora_name"]
    loaded = [answer["loaded_adapters"] for answer in transport.control.on_all(endpoint, bodies)]
    for stale in sorted(set().union(*loaded) - {name}):
        unload = [{"lora_name": stale} if stale in held else None for held in loaded]
        transport.control.on_all("unload_lora_adapter", unload)
    return name
