import torch


def samples(size: int = 24) -> list[dict[str, torch.Tensor]]:
    """One image and its class."""
    return [{"pixel_values": torch.zeros(3, size, size), "targets": torch.tensor(1)}]
