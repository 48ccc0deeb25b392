"""nnU-Net's data augmentation for whole batches on the training device.

Image patches are sampled as nnU-Net samples them (``resident``) and changed by nnU-Net's own transforms, translated one
by one to operations on batches (``translate``). Probabilities and ranges are read from nnU-Net's transform objects, so
a trainer that changes them changes both paths.
"""
