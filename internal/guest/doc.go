// Package guest assembles one storage operating system: it opens the pools of
// the identities that it holds, serves them, watches its partner and drives
// the partner machine.
//
// # Goroutines
//
// One loop owns the machine and everything the machine decides about: what is
// held, the partner's mapped regions, the line to the agent. What takes time
// (opening, releasing, stopping) runs in goroutines of its own and posts its
// outcome to the loop. For each open pool there is one goroutine for its
// consistency points, one that probes it and beats its heartbeat, one that watches each of
// these two, and one for each device that watches its requests. The guest waits for all of
// them before it returns, but for a pool that is stuck it does not: that ends the process.
// While a pool is opened, some more open its devices and read what they say, several at once.
//
// # What must hold
//
//   - A pool is opened only under the locks of all its devices, which are
//     those of the descriptions that its I/O goes through.
//   - The heartbeat of a region advances only when a probe has passed the path
//     of a write up to log publication, and the loop is awake.
//   - When a pool ends by itself, or is released, its clients are cut first
//     and its devices are closed before anybody is told.
//
// # Locks
//
// Guest.mu guards the tenancies, which control requests look at. It is held
// for look-ups only, never while waiting, and no other lock is taken under it.
package guest
