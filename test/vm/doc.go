// Package vm boots virtual machines for tests: QEMU without hardware help, a
// kernel of Debian, and as first process a program of ours that does what the
// test asks.
//
// A machine has no disk of its own. What it runs is in the archive that the
// kernel unpacks when it starts: programs of this host with the libraries that
// they load. It is up within some seconds. Its memory is a shared file, so that
// a vhost-user back-end can map it.
package vm
