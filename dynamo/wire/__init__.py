"""What crosses process boundaries: the bytes (frames, codec), the messages, and the streams that carry items."""
