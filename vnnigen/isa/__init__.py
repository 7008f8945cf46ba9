"""What an x86 machine is: features and tiers, registers, the assembler, the emulator."""
