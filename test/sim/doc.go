// Package sim runs a whole pair in one process, in virtual time: two guests
// and the agent that watches them, their clients, the lines between them,
// regions and devices. What decides is the real code (partner, pool and
// everything below it); what surrounds it is simulated, and may fail.
//
// # Scripts
//
// A run is a [Script]: a seed and a list of steps, each a line of text: a
// request of a client, a fault, a command, a wait, an expectation. Scenarios in
// testdata are scripts that people wrote. A random run is a script that was
// drawn from a seed. When one fails, [Shrink] takes steps away for as long as
// it goes on failing, and prints the rest, which can be kept as a scenario.
//
// # Time and order
//
// Everything runs in a bubble of testing/synctest. One goroutine, the World's,
// owns the state of the simulated surroundings. Product code runs in
// goroutines of its own and meets the surroundings at devices only; there it
// leaves a note and waits. The World lets all of it come to rest, takes the
// earliest event in virtual time (a device request that reaches the medium or
// completes, a message, a request, a tick), lets it happen, and waits for rest
// again. All latencies are drawn from the seed, so that the order of events,
// and with it the interleaving of the product code at its I/O, is the seed's.
// With one processor for goroutines and no garbage collection meanwhile, the
// same script gives the same trace, to the byte.
//
// Not explored: interleavings between two device operations. For those there
// are the race detector and test/campaign.
//
// # Death
//
// A guest may die at any counted operation: a device request, a completion, a
// message, a request or reply of a client. From then on none of its operations
// has an effect: its devices return errors, its mapping of regions is replaced
// by a private copy, and its goroutines run out. What it had under way at
// devices may still reach them, whole, torn or not at all, until its locks are
// gone. Whatever lies behind the end of its log may be scribbled over with
// half-written records.
//
// # Copies
//
// A pool may keep copies of each block. One disk of each mirror may then do
// anything, at any request: fail, vanish and return, flip, lose or misdirect what it
// is given, decay, be taken out or replaced; and nothing of that is an excuse for
// any request. At the end all mirrors are made whole, each copy is proved, and the
// power is cut once more while all but one disk of each mirror are pulled: what is
// left must be everything.
//
// # Flash
//
// A pool may have a flash device. Its policy then decides ten times a second, by the last
// second's requests, so that data sets come and go while clients, deaths and power cuts go on.
// Clients cannot tell: what they read is compared as everywhere. At the end of a run what is
// to leave the pool has left it, and the pool's check proves the table.
//
// # Restart records
//
// Guests keep restart records, after opening a pool and after each command, and open pools by
// what they find. Deaths leave them older than the pool, or damaged anywhere, in both of their
// places or one. Clients cannot tell, and what must hold without a record must hold with it.
//
// # What is checked
//
// The oracle reads each record as it is published in a region, and keeps the
// history of every block:
//
//   - a record holds what a request under way asked for, and partial blocks keep
//     their other bytes; or it is a cleaner's or a scan's, and holds what the block holds;
//   - a write is acknowledged only after all of it was published, and is
//     published once;
//   - a change of a client that sends requests again by number (a setting of the script) is
//     published once, whole and behind its tag, however many guests die over it, and what
//     the session says of a request is what the log had of it;
//   - a read returns for each block a version that was current between its
//     call and its return;
//   - after the death of guests all records are served; after a power cut a prefix
//     of them that holds everything flushed;
//   - one guest at a time has the devices of a pool, and nobody acts on an identity
//     that another guest may still act on;
//   - requests end when nothing hinders them, and hold no memory afterwards;
//   - the pool's own check finds counts and space exact at the end, and every byte
//     is read and compared.
package sim
