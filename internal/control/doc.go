// Package control is how people and programs manage a running pair: the types
// that travel, a client with one method for each command, and the server glue
// that the agent and the guests put their functions into.
//
// It is HTTP with JSON bodies over unix sockets of mode 0600, so that the
// permissions of a socket are the permissions to manage. The agent serves the
// whole interface at DIR/run/agent.sock; each guest serves status, volumes
// and check for what it owns at DIR/run/guest-NAME.sock, which is where the
// client looks when the agent is gone. Durations travel as milliseconds in
// fields that end in _ms, sizes as bytes.
//
// The package holds no state and takes no locks.
package control
