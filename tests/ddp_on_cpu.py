"""nnU-Net's distributed training without GPUs: gloo for NCCL and the CPU for the GPUs; all else is nnU-Net's own.

As a script it is ``nnUNetv2_train``: ``python ddp_on_cpu.py 118 2d 0 -tr TRAINER -num_gpus 2``.
"""

import torch
import torch.distributed as dist
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import batch_norm
from torch.nn.parallel import DistributedDataParallel

nnunet_run_ddp = run_training.run_ddp


def batch_norm_of_all_processes(layer: torch.nn.SyncBatchNorm, images: torch.Tensor) -> torch.Tensor:
    """What SyncBatchNorm computes on GPUs, for the CPU tensors that it refuses."""
    weight, bias = layer.weight, layer.bias
    if not layer.training:
        return batch_norm(images, layer.running_mean, layer.running_var, weight, bias, eps=layer.eps)
    axes = [0, *range(2, images.ndim)]
    shape = [1, -1] + [1] * (images.ndim - 2)
    count = torch.tensor(images.numel() / images.shape[1], dtype=torch.float64)
    dist.all_reduce(count)
    mean = all_reduce(images.sum(axes)) / count.to(images.dtype)
    centred = images - mean.view(shape)
    variance = all_reduce((centred**2).sum(axes)) / count.to(images.dtype)
    with torch.no_grad():
        layer.num_batches_tracked += 1
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * (count / (count - 1)).to(images.dtype), layer.momentum)
    return centred * (variance + layer.eps).rsqrt().view(shape) * weight.view(shape) + bias.view(shape)


def setup(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def use_cpu() -> None:
    torch.nn.SyncBatchNorm.forward = batch_norm_of_all_processes
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, network: None  # insists on GPUs
    torch.cuda.set_device = lambda device: None
    run_training.setup_ddp = setup
    trainer_module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    # nnU-Net's trainer gives itself the GPU of its rank.
    trainer_module.nnUNetTrainer.device = property(lambda self: torch.device("cpu"), lambda self, device: None)


def run_ddp(rank: int, *arguments: object) -> None:
    use_cpu()
    torch.set_num_threads(1)
    nnunet_run_ddp(rank, *arguments)


if __name__ == "__main__":
    run_training.run_ddp = run_ddp
    run_training.run_training_entry()
