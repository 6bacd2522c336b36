// Package flashmap puts data sets of slow devices on a fast one: an [hpdi.Device] over
// a primary device and flash, which sends each request to where its data are. Whoever
// uses it sees one device whose ranges differ in what it costs to reach them.
//
// # Theory
//
// A [Flash] is a device, which may be a mirror, with slots of one size, the data set:
// 64 KiB to 1 MiB. It serves up to 64 primaries ([Flash.Over]), and its table says
// which data set of which of them is in which slot. A data set that is on flash is
// nowhere else: it is read and written there until it is moved back. So flash is no
// cache that may be thrown away, and the primary's copy of it is worth nothing.
//
// Which data sets are moved is not decided here. Ranges that are fixed, labels and
// whatever must be found before the flash device is, are never moved; and for what is
// lost without it, whoever opens the primary has to refuse to do so alone.
//
// # Which of two is believed
//
// Two things say that a data set is on flash: the table, by slot, and the map, one bit
// for each data set of a primary. Both must. They are written with one sync at the end
// of each move, and whatever a power cut leaves of the two, both places hold the same
// then, because nobody has written to the data set between. The map is there for the
// day on which a page of the table cannot be read: what it names and no other page of
// the table has was named by the lost one. Exactly those data sets are errors, instead
// of what the primary has had since before they were moved. They stay so until they
// are discarded whole ([Flash.Tidy]), and nothing is moved to flash meanwhile. Is a page
// of the map lost, the table is believed and the page written anew. Only where both are
// lost, all data sets of the range that no slot is known for are errors.
//
// Every page, and the label, lies at two places at both ends of the device, and both are
// written each time: the first is the change, the second keeps a place that decays from
// bringing back what was before.
//
//	considered                          and why not
//	two tables, one at each end         both lost, nobody knows which data sets were there
//	a mark by large ranges of sets      a lost page would make data sets errors that were
//	                                    never moved
//	the name of the data set in its     slots would not be aligned, and all of flash is to
//	slot                                be read to find what is lost
//	a log of moves                      it has to be replayed and cut; moves are rare, and
//	                                    two pages are small beside a data set
//
// # Moves
//
// A [Move] copies a data set piece by piece, as little in a step as the medium is worth
// asking for, so that who drives it can leave clients time between steps; [Device.Busy]
// tells when they need it. Writes go on where the data set is, and
// mark what they have changed when they complete; what is marked is copied again. When
// nothing is marked and no write is under way, or after some turns in any case, new
// writes to this one data set are held, and the table is written:
//
//	to flash:  copy, sync flash, write table and map, sync flash, send requests there
//	back:      copy, sync the primary, write table and map, sync flash, send requests
//	           there, wait for readers of the slot, free it
//
// A write that is held is not in anybody's way: it has entered no data set, its queue
// goes on with others, and it is started when the data set is where it is to be. Writing
// to both places in the last step would hold nobody, but of two writes to one block
// that are under way together each place might keep another one.
//
// When writing the table fails, nobody knows what it says. The data set then takes no
// writes until a step of the move has gone well; reads of it and everything else go on.
//
// The mover reads what clients may not have flushed yet. That is as good: a flush of a
// client covers both devices, and a move makes what it has copied durable before anybody
// relies on it. A flush asks the flash device only when writes have completed there that
// no flush has covered, so that one that fails hinders nobody who has nothing on it.
//
// A flash device that fails is an error for what is on it, and for nothing else. One that
// hangs is worse: a queue waits for it while it has requests there, since devices can
// only be waited for one at a time. It is to be watched as all devices are. A goroutine
// that waits for one of them is no way out: nothing may be submitted to a queue that
// somebody waits for, so that disks would get no new requests before an old one is over.
//
// What is copied is not verified: checksums are known to who reads. Of a mirror every
// copy is read, because rot in one of them would become all that there is. Where they
// differ although nobody writes, the move ends with ErrCopiesDiffer, and the data set
// stays where a reader can still choose the copy that is right; unless nobody reads that
// block before it is written again.
//
// A mirror that fills a copy passes over what nobody reads: of the flash device slots
// that are free, of a primary what is on flash. Slots that are being filled and data sets
// on their way back are filled in: of what a move has written already the copy may lack
// what was written before it came.
//
// # Notes
//
// Whoever decides what is moved keeps what it knows where the data are, so that it comes
// with them to whoever opens them next ([Flash.WriteNote]). A note is replaced as a
// whole, at the place that does not hold the newest one; it counts from its header on,
// which is written when its content is durable. Both places are in front of all slots.
//
// # Invariants
//
//	a slot holds at most one data set, and a data set is in at most one slot
//	a data set is found in a slot  =>  table and map say so, durably
//	a slot is free  =>  the table says so, durably, and nobody reads from it
//	a write is under way to a data set  =>  it is where the data set is
//	a data set of which table and map do not say the same has no writes under way
//	a place of a note is written  =>  the other one is whole and durable, if one was
//
// # Memory
//
// 13 to 16 bytes for each data set on flash, and a bit for each data set that a primary
// has: with 64 KiB, 220 to 260 MiB a TiB of flash and 2 MiB a TiB of primaries; with
// 1 MiB a sixteenth of that. Looking up takes no lock that all requests share and no
// memory; data sets are divided among 1024 locks by hash. It was measured with 32 ns when
// 16 thousand data sets are on flash and 64 ns with a million, at random. Counting what is
// used ([Flash.Use]) adds some 3 ns to the 165 that a request of 4 KiB takes when both
// devices are memory.
//
// # Locks
//
// tableLock is held while the table, the map or the label is written, by moves and by
// what resizes. A stripe is held for some tens of nanoseconds, never across I/O. tableLock
// and the lock of a note, which is held while that is read or written, are taken before
// stripes, stripes before slotsMu; tidyMu, and the queuesMu of a device, are alone. A mirror
// that asks what is unused has a range alone for which others may wait with a stripe held: it
// only tries to take one. A move in its last step holds writes, not locks: who waits for it has entered
// nothing, so nobody waits in a circle.
//
// The package starts no goroutines: its owner calls Step, and Tidy.
package flashmap
