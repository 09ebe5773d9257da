"""What model families share: linear maps, norms, rotary positions, attention, decoder, towers."""
