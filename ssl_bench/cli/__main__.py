"""``python -m ssl_bench.cli``."""

from ssl_bench.cli.app import main

if __name__ == "__main__":
    main()
