"""DDP, FSDP2, SyncBatchNorm and DTensor on the kernels."""

from distributed_checks import distributed, test_two_processes  # noqa: F401
