// Package restart has the restart record: what a guest has found out about a pool and its
// surroundings, for whoever opens the pool next, so that it need not find it out again.
//
// A record is advice. It is kept in the pool's region, see [Slots], and in a file of the
// pair's directory, see [Write], because each outlives what the other does not: the region a
// full disk, the file the region. Of two the one with the higher number counts. It may be
// missing, damaged, of another version or older than what it tells of, and then the pool is
// opened as if there were none.
//
// # How it is known that nothing has changed
//
// Nothing in a record is believed because it stands there. Each statement is compared with
// something that must be had anyway, or that costs no request to a device:
//
//	program, boot, settings     what runs now and by what: one file that is read anyway
//	paths, files, sizes         the descriptions under whose locks the devices are used; a
//	                            file is told by when it was made, a disk by the number that
//	                            the kernel gave it when it came
//	label of the first device   read
//	devices of the pool         the superblock, which is read anyway: all ids, states,
//	                            classes and sizes
//	epoch, generation           no newer than those of the superblock
//	labels of other devices     read before the first request to the device, whatever that
//	                            is, and all of them before anything is written to any
//	volumes                     the catalogue, which is replayed anyway, and counts
//
// There is no number of the configuration that all labels carry: to change it would be a
// write and a sync to each of 64 devices for each volume that is made, with a state between
// for each of them that a power cut can leave. The superblock lists the ids of all devices,
// each label has one of them, and the record has the labels byte by byte; so a device that
// was swapped, put back to an older state or labelled anew is found by its own label, however
// a number may stand.
//
// Why it is safe to serve before all labels were read: a device to which nobody has made a
// request cannot have done anything wrong. The first request waits for the label; what is
// acknowledged lies in the region; and the pool's only writer waits for all labels before
// it makes its first consistency point. A label that is not what the record says stops the
// pool as losing its ownership does, with no device written to, and it is opened by looking
// for everything, which says what is wrong.
package restart
