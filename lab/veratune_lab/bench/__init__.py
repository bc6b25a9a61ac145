"""Side by side against PEFT on this machine."""
