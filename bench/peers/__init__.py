"""The engines that Packtrain is compared with: environments of their own, and a process each while a bench runs."""
