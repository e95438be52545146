"""Stratum, the language of miners: what is said (protocol), how hard (vardiff), and over which sockets (server)."""
