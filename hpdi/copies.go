package hpdi

// Copies is a Device that keeps several copies of each block and cannot tell by
// itself which of them is good.
type Copies interface {
	Device
	// ReadGood reads len(buf) bytes at off from the first copy for which good
	// returns true, and makes those before it like it. It returns how many it
	// has repaired. The range must not cross a multiple of 1 MiB.
	ReadGood(off int64, buf []byte, good func([]byte) bool) (repaired int, err error)
	// NumCopies returns how many copies there are, those that are away included.
	NumCopies() int
	// ReadCopy reads at off from copy i, from 0, alone and repairs nothing. It
	// returns ErrNoCopy when that copy is away, or need not have what was written
	// to the range. What is being written meanwhile may be read in part.
	ReadCopy(i int, off int64, vec ...[]byte) error
	// Settle writes p, which was read from one of the copies at off, to those
	// that hold something else, and makes it durable. It is for what a crash
	// may have left on some copies only, once somebody has gone by it. It
	// returns how many copies it has written.
	Settle(off int64, p []byte) (written int, err error)
	// ProveOwn reads what the device keeps for itself on its copies, writes anew what
	// is not as it should be, and returns how many blocks were not.
	ProveOwn() (mended int, err error)
	// Verified says that whoever reads bytes from off on checks them, and uses
	// ReadGood or Settle, so that the device need not decide which copy to
	// believe.
	Verified(off int64)
	// Unused gives the device a function that says of a range, from the offset
	// that Verified was given on, that nobody reads it before it is written
	// again: then it need not be the same on all copies. It is called with
	// nothing being written to the range, until the device is closed.
	Unused(unused func(off, n int64) bool)
}
