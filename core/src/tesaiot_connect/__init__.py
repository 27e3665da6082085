"""tesaiot-connect: moves IoT telemetry between MQTT brokers and everything else."""
