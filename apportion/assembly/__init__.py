"""From a configuration to running actors, role by role; `apportion.build` puts it together."""
