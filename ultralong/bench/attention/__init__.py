"""Speed and accuracy of attention kernels and schemes."""
