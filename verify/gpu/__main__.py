"""Run `python -m kilodelta.verify.gpu`."""

from kilodelta.verify.gpu.machine import main

raise SystemExit(main())
