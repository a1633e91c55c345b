"""What steers a stream: text, image, motion and pose once per session, audio once per block."""
