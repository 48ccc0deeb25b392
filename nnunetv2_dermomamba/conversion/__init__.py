"""Dermoscopy data sets in their official layouts, converted to nnU-Net's raw data format; imports no torch."""
