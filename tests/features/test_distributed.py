"""DDP, FSDP2, SyncBatchNorm and DTensor on the path of a plain CPU process."""

from distributed_checks import test_two_processes  # noqa: F401
