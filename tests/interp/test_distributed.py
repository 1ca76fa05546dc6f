"""DDP, FSDP2, SyncBatchNorm and DTensor on the kernels."""

from distributed_checks import test_two_processes  # noqa: F401
