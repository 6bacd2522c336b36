// Package ring is the way of requests between two domains that share nothing but
// memory: a front-end in the domain of an application, and a back-end in the
// guest that has the storage. docs/format/ring.md shows the layout.
//
// # What is shared
//
// A ring is one file of memory. The front-end makes it: a header that never
// changes, a page of each side, some queues, and a data area. A queue has slots.
// A request lives in one slot from when it is put until its completion has been
// taken; its payload lies in the data area, or in other memory that the front-end
// has handed over, and is never copied here. Submissions are a ring of slot
// numbers with a position that only grows, and a request's number, its counter,
// is its position plus one: so no two requests of a queue ever have the same.
// Completions are a ring as well, written by the back-end.
//
// Each word has one side that writes it. So the text of a failure does not lie where the
// pieces of memory of the request were: a back-end that dies before it has said that a
// request has failed would leave one that cannot be run again.
//
// # What holds when a side dies
//
// Either side may end at any instruction. What it was about to say is said by one
// store of one word, the last of several, and until that store nobody reads the
// others:
//
//   - put: slot, table and place in the ring of submissions, then its position. A
//     front-end that dies before that has submitted nothing.
//   - complete: the entry in the ring of completions, then its position. A back-end
//     that dies before that has not completed the request, whatever it has done.
//   - take: a completion is taken by clearing the slot's counter, and then moving the
//     head. So each entry before the head has a slot that is empty or in use again.
//
// A new back-end therefore finds what is to be done by looking: a slot whose
// counter is not 0, not beyond the position of submissions, and not among the
// completions from the head on, has been submitted and not completed ([Back],
// recover). It runs those in the order of their counters before anything newer.
// Whether one of them was done already it asks whoever keeps the tags (session,
// queue, slot and counter, all in the entry): the ring cannot know. When the
// front-end dies there is nothing to recover: nobody waits for the answers.
//
// One back-end at a time. With a socket the front-end sees to that: it looks for
// the next one when the connection to the last one has ended, and a back-end
// leaves a connection open until what it runs has ended. Of a back-end that is
// killed, the host makes sure (fence). Without a socket a lock on the file does,
// and between machines whoever starts them.
//
// # What each side believes
//
// Nothing. Words are read once, into memory of one's own, and compared with what is
// possible. What is not possible ends the connection with [ErrBroken] and a text
// that says what was wrong. Memory that is handed over must be sealed against
// becoming smaller, so that it cannot go away under the side that maps it.
//
// # Waking
//
// Who is about to sleep says so in a word, looks once more and sleeps; who has put
// something looks at that word after it. Both with sequentially consistent stores,
// so that one of them sees the other. While a side looks (internal/spin) it
// is not woken and its peer makes no system call.
//
// Front and Back are passive and belong to one goroutine at a time: they make no
// system call, and a test takes them through every store. Bell wakes and sleeps;
// Server has the goroutines of a back-end.
package ring
