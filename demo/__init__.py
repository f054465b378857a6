"""What ``ztsnr demo`` shows: networks trained on real pictures, and what is measured on them."""
