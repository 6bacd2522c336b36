package devbench

import (
	"time"

	"golang.org/x/sys/unix"
)

// CPU returns the processor time that this process has used, in user and in system mode:
// other work of the machine is not in it, the kernel's threads that work for the process are.
func CPU() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // the kernel refuses only what is no process
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
