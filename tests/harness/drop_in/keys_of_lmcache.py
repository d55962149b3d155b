"""Prints LMCache's chunk keys for a prompt, and LMCache's configuration keys. Runs in LMCache's environment.

python keys_of_lmcache.py '{"algorithms": ["sha256_cbor"], "tokens": [...], "model": "m", ...}'
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import torch
    from lmcache.v1 import config as definitions
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.token_database import ChunkedTokenDatabase

    asked = json.loads(sys.argv[1])
    metadata = LMCacheMetadata(
        model_name=asked["model"],
        world_size=asked["world_size"],
        local_world_size=asked["world_size"],
        worker_id=asked["rank"],
        local_worker_id=asked["rank"],
        kv_dtype=torch.bfloat16,
        kv_shape=(2, 2, 256, 2, 16),
    )
    keys = {}
    for algorithm in asked["algorithms"]:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256, pre_caching_hash_algorithm=algorithm, save_unfull_chunk=True
        )
        database = ChunkedTokenDatabase(config, metadata)
        keys[algorithm] = [key.to_string() for _, _, key in database.process_tokens(tokens=asked["tokens"])]
    names = sorted(definitions._CONFIG_DEFINITIONS)
    aliases = sorted({*definitions._CONFIG_ALIASES, *definitions._DEPRECATED_CONFIGS})
    sys.stdout.write(json.dumps({"keys": keys, "config": names, "aliases": aliases}) + "\n")


if __name__ == "__main__":
    main()
