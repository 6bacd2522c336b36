// Package blocktest holds devices for tests, and the model of a volume that
// tests compare against.
//
//   - [Crash] is a device in memory whose power can be cut, now or after the
//     n-th operation of all devices that share a [Clock]. What was not flushed
//     is then kept, dropped or torn by seed.
//   - [Fault] wraps a device and misbehaves by rule: errors, flipped bits, lost
//     and misdirected writes, held requests, a shorter capacity.
//   - [Recorder] wraps devices and writes down what they are asked to do, for
//     golden traces in which a missing flush shows.
//   - [Disk] computes how long a rotating disk takes for requests, by itself or below a
//     device, and counts how often the head has to go elsewhere.
//   - [SSD] does the same for a flash drive, where requests go on beside each other and
//     it does not matter where they go.
//   - [Model] knows what a volume must hold after a sequence of changes, and
//     which states a power cut or the death of a guest may leave.
//
// # Fault model of Crash
//
// A write is visible to reads as soon as it has been submitted. It is durable
// once a flush was submitted after a Wait had returned the write; a flush that
// is in flight together with a write does not cover it. A write that is itself
// Durable needs no flush once a Wait has returned it. Whatever is not durable
// when power is cut is decided for each operation by seed: kept, dropped, or
// torn to any subset of its 512-byte sectors; where such operations overlap,
// any of them may win. Sectors are atomic. Flushed data are never lost, also not those
// beside a torn write. A discard is treated as a write of zeroes that may be
// lost, and while power is on each discarded block reads by seed as zero or as
// before.
//
// Everything is a function of the seeds and of the order of operations, so a
// workload of one goroutine can be cut at each of its operations in turn and a
// failure can be run again.
//
// Lock order: a Crash's medium, then its Clock. Fault, Recorder, Disk and SSD hold no
// lock while they call the device below.
package blocktest
