"""The demo: a trained ImageNet network on real photos, convolution by convolution."""
