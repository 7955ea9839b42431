"""Run by `robustft bench pipeline` in an interpreter that has vLLM; imports nothing of robustft.

Reads {"model", "prompts", "tokens", "ends", "dtype"} as JSON, writes {"replies", "seconds"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Generate the replies three times, after a warm-up of one token."""
    asked = json.load(sys.stdin)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    engine: Any = vllm.LLM(
        model=asked["model"],
        dtype=asked["dtype"],
        max_model_len=2048,
        enable_prefix_caching=True,
        generation_config="vllm",
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]

    def generate(tokens: int) -> list[Any]:
        settings = vllm.SamplingParams(
            temperature=0,
            max_tokens=tokens,
            logprobs=0,
            stop_token_ids=asked["ends"],
            detokenize=False,
        )
        engine.reset_prefix_cache()
        return list(engine.generate(prompts, settings, use_tqdm=False))

    generate(1)
    seconds, outputs = [], []
    for _ in range(3):
        begin = time.perf_counter()
        outputs = generate(asked["tokens"])
        seconds.append(time.perf_counter() - begin)
    ends = set(asked["ends"])
    replies = [
        [token for token in output.outputs[0].token_ids if token not in ends] for output in outputs
    ]
    print(json.dumps({"replies": replies, "seconds": seconds}))


if __name__ == "__main__":
    main()
