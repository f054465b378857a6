"""``ztsnr demo``: networks trained on real pictures, and measurements on them."""
