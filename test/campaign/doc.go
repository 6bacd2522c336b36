// Package campaign hurts a real pair at random and looks whether anything was
// lost. It starts the program as a person would, writes and reads volumes of
// both guests over several NBD connections, and meanwhile kills, stops, hands
// over and restarts guests and agent by a schedule that a seed draws.
//
// What must hold:
//
//   - A write that was acknowledged is read back for ever, until it is
//     overwritten: reads of each unit of a volume are linearizable. A unit is
//     a register whose values are the numbers of the operations that wrote it.
//   - An attempt whose connection was lost may or may not have had an effect;
//     it has none any more once the next connection is ready, because whoever
//     serves then has fenced the one before (see package nbdclient).
//   - No unit is torn: each tells its volume, its place, its operation and a
//     checksum over itself.
//   - No request fails and no request hangs; clients see pauses only.
//   - After each fault the pair is whole again by itself: both guests up,
//     everything served, protected, no alert.
//   - At the end the recount of the pools is clean, running and down, and what
//     was read last is read again after a clean restart.
//
// Run it longer, or run a failure again:
//
//	go test ./test/campaign -v -timeout 0 -rounds 300
//	go test ./test/campaign -v -timeout 0 -rounds 300 -seed 1234
//
// The same seed draws the same faults with the same delays; what the kernel's
// scheduler does between them is its own.
package campaign
