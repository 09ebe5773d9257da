"""The serve command, before anything slow is imported."""

from e5v_jax.serve.options import Args


def serve(args: Args) -> None:
    """Answer requests until a signal comes; see e5v_jax/serve/server.py.

    Raises UsageError: a bad flag; ImportError: the extra ``serve`` is not installed; and what the
    server raises.
    """
    args.check()
    try:
        # here, not above: --help and bad flags do not need JAX
        from e5v_jax.serve.server import run_server
    except ImportError as error:
        raise ImportError(f"{error}: the server needs pip install 'e5v-jax[serve]'") from error
    run_server(args)
