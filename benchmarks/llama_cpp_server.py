"""llama.cpp's own server for embeddings, as benchmarks/serve.py compares it with ours.

    python -m venv peer && peer/bin/pip install xllamacpp
    peer/bin/python benchmarks/llama_cpp_server.py MODEL.gguf --port 8001

It embeds the last token, as E5-V does. Texts must come with the prompt around them: it has none.
"""

import argparse
import threading

import xllamacpp  # type: ignore[import-not-found]  # of the peer's own environment

LAST = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--slots", type=int, default=64, help="requests that are batched together")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.embedding = True
    params.pooling_type = LAST
    params.n_parallel = args.slots
    params.n_ctx = 512 * args.slots
    params.n_batch = params.n_ubatch = args.tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.port = args.port
    server = xllamacpp.Server(params)
    print(f"ready: {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
