"""`python -m dllm` is the command `dllm`."""

from dllm.cli.main import main

raise SystemExit(main())
