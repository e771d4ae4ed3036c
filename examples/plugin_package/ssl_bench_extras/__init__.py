"""Plug-ins for ssl_bench; pyproject.toml names each as an entry point."""
