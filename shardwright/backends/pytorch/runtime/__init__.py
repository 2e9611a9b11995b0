"""What the emitted `train.py` needs beyond torch. These files are copied beside it as they are; they are yours."""
