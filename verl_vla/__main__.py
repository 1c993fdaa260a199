"""``python -m verl_vla VERB ...``."""

from verl_vla.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
