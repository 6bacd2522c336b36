// Package policy decides which data sets of primary devices lie on flash. It is shown how
// devices are used, which package collect counts, and what is on flash, and answers with
// moves; it does no I/O, has no clock and no goroutines, and decides the same whenever it is
// shown the same. So [Simulate], which shows it a history, tells what a guest would do.
//
// # What belongs on flash
//
// A data set is a candidate when it shows the pattern of its device's type ([Pattern]): all
// the limits that are set, and, if there is one, the rule of promotion, an expression over
//
//	reads, writes   accesses in a window outside of runs, numbers such as 12.5
//	sequential      accesses in runs
//	random          share of the accesses that are outside of runs, 0 to 1
//	size            mean size of the requests, bytes
//	age             since the newest access outside of runs, as duration("10m")
//	references      of whatever lies there, a whole number; pinned, on_flash: true or false
//
// in CEL (github.com/google/cel-spec), without its macros, so that no expression repeats
// anything; size, depth and cost of one are bounded. A rule whose evaluation fails is as one
// that does not hold, and [Engine.Status] tells of it.
//
// Candidates are ranked by the time that flash saves: accesses in a window, writes counted by
// their weight, times what one access saves on that type of device. The first get the free
// slots. What is on flash and shows its pattern no more stays until its slot is wanted. A
// candidate then takes the place of
//
//	a set for which the rule of demotion holds, else
//	one that shows its pattern no more, if that saves less, else
//	the one that saves least, if that is less by both margin and gain ([Hysteresis])
//
// and of none that is pinned, or came to flash a moment ago. Limits count in part for what is
// on flash already (Hysteresis.Keep), so that a set at a limit does not go to and fro.
//
// Pins come before everything, in their order. Runs count nothing: a scan moves no set.
//
// # Budgets
//
// All copying, in both directions, is within Budget.Migrate. What promotions and clients
// write to flash together is within Budget.Wear in any 24 hours; clients are not held up by
// it, promotions are. When the steps of a move may be taken, so that clients hardly wait for
// them, [Pace] says.
//
// # Failures
//
// A move that failed is not tried again for a minute, then two, up to six hours, and after
// it nothing of its device moves for five seconds, up to ten minutes. [ErrNoRoom] is no
// failure.
package policy
