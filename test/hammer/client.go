package hammer

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// Target is an app as clients reach it.
type Target struct {
	Name     string // what Allows is asked about; several targets may share one
	Pod      string // whose app it is
	App      string // key of the app among those of the Siege
	Protocol verdict.Protocol
	Addr     netip.AddrPort
}

// key tells targets apart.
func (t Target) key() string { return t.Protocol.String() + " " + t.Addr.String() }

// Attempt is one connection that was tried.
type Attempt struct {
	Peer   string
	Target Target
	Nonce  string
	Began  time.Time
	Ended  time.Time
	// Answer is what came back, without its newline; empty: no byte came.
	Answer string
	Err    error // of whatever kept the answer from coming
}

// wanted is the answer of the app that is meant.
func (a *Attempt) wanted(app *App) string { return fmt.Sprintf("%d %s", app.port, a.Nonce) }

// attemptPatience bounds one attempt. Denied ones are refused or closed at once; allowed ones wait for certificates and clusters.
const attemptPatience = 10 * time.Second

var nonces atomic.Uint64

// attempt tries one connection, or one exchange of datagrams. It must run on a thread of the peer's network namespace.
func attempt(peer string, to Target, open sockets) Attempt {
	a := Attempt{Peer: peer, Target: to, Nonce: fmt.Sprintf("n%d", nonces.Add(1)), Began: time.Now()}
	if to.Protocol == verdict.UDP {
		a.Answer, a.Err = open.ask(to.Addr, a.Nonce)
	} else {
		a.Answer, a.Err = ask(to.Addr, a.Nonce)
	}
	a.Ended = time.Now()
	return a
}

func ask(to netip.AddrPort, nonce string) (string, error) {
	c, err := net.DialTimeout("tcp", to.String(), attemptPatience) //nolint:noctx // an attempt ends by itself
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(attemptPatience))
	if _, err := fmt.Fprintf(c, "%s\n", nonce); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

// Siege is a set of clients that hammer apps.
type Siege struct {
	chronicle *Chronicle
	apps      map[string]*App
	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup
	gate      sync.RWMutex // held for reading by each attempt

	mu       sync.Mutex
	attempts []Attempt            // that nobody has judged
	count    int                  // attempts so far
	counts   map[string]int       // the same, by peer and target
	latest   map[string]time.Time // when the last attempt that has ended began, by peer and target
	more     chan struct{}        // closed at the next attempt
	failed   error
	excused  []span
	// What the apps have seen and no judged attempt stands for.
	seen    map[string]Visit // by app and nonce
	silent  map[string]int   // by app
	streams map[string]bool  // what streams have begun, by app and nonce
	late    map[string]bool  // datagrams that may yet arrive and that are no wrong then, by app and nonce
	mute    map[string]int   // exchanges of datagrams in a row that had to be answered and were not, by peer and target
	breaks  []broken         // of streams, that nobody has judged
	echoed  uint64           // bytes of streams that came back as they were sent, since the last Judge
}

type span struct {
	pod      string // at either end
	from, to time.Time
}

// NewSiege returns a siege of apps that nobody takes part in yet.
func NewSiege(c *Chronicle, apps map[string]*App) *Siege {
	s := &Siege{chronicle: c, apps: apps, more: make(chan struct{}), counts: map[string]int{}, latest: map[string]time.Time{}, seen: map[string]Visit{}, silent: map[string]int{}, streams: map[string]bool{},
		late: map[string]bool{}, mute: map[string]int{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// serve adds an app that streams may reach.
func (s *Siege) serve(key string, app *App) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apps[key] = app
}

// Join has a pod try targets, one after the other with a rest between them, until Stop.
func (s *Siege) Join(pod *netns.Pod, targets []Target, pause time.Duration) {
	s.running.Go(func() {
		err := pod.Do(func() error {
			rest := time.NewTimer(pause)
			defer rest.Stop()
			open := sockets{}
			defer open.close()
			for i := 0; s.ctx.Err() == nil; i++ {
				s.gate.RLock()
				s.add(attempt(pod.Name(), targets[i%len(targets)], open))
				s.gate.RUnlock()
				rest.Reset(pause)
				select {
				case <-rest.C:
				case <-s.ctx.Done():
				}
			}
			return nil
		})
		if err != nil {
			s.mu.Lock()
			s.failed = err
			s.mu.Unlock()
		}
	})
}

// Pause returns when no attempt is under way; none is until resume is called. Streams go on.
func (s *Siege) Pause() (resume func()) {
	s.gate.Lock()
	return s.gate.Unlock
}

// Excuse says that between two times what a pod was an end of did not have to be answered: its sidecar had been killed.
func (s *Siege) Excuse(pod string, from, to time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.excused = append(s.excused, span{pod, from, to})
}

// isExcused reports whether something between two pods was excused at any time from one to another.
func (s *Siege) isExcused(peer, pod string, from, to time.Time) bool {
	for _, e := range s.excused {
		if (e.pod == peer || e.pod == pod) && from.Before(e.to) && to.After(e.from) {
			return true
		}
	}
	return false
}

func (s *Siege) add(a Attempt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempts = append(s.attempts, a)
	s.count++
	s.counts[a.Peer+" "+a.Target.key()]++
	s.latest[a.Peer+" "+a.Target.key()] = a.Began
	close(s.more)
	s.more = make(chan struct{})
}

// Await returns when so many more attempts have ended.
func (s *Siege) Await(ctx context.Context, n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	want := s.count + n
	if err := s.until(ctx, func() bool { return s.count >= want }); err != nil {
		return fmt.Errorf("wait for %d more attempts: %w", want-s.count, err)
	}
	return nil
}

// AwaitEach returns when a peer has begun and ended an attempt at each of some targets.
func (s *Siege) AwaitEach(ctx context.Context, peer string, targets []Target) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := maps.Clone(s.counts)
	for _, to := range targets {
		key := peer + " " + to.key()
		if err := s.until(ctx, func() bool { return s.counts[key] >= before[key]+2 }); err != nil { // one may have been under way
			return fmt.Errorf("wait for %s to try %s: %w", peer, to.key(), err)
		}
	}
	return nil
}

// AwaitSettled returns when the last state, which must have been confirmed, is the only one in force, and a peer has begun and ended an attempt at each
// of some targets since. What is under way at the next edit is then held against two states, and against more only if it lasts until the edit after that.
func (s *Siege) AwaitSettled(ctx context.Context, peer string, targets []Target) error {
	settled := s.chronicle.Settled()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, to := range targets {
		key := peer + " " + to.key()
		if err := s.until(ctx, func() bool { return !s.latest[key].Before(settled) }); err != nil {
			return fmt.Errorf("wait for %s to try %s while policy is at rest: %w", peer, to.key(), err)
		}
	}
	return nil
}

// until waits, attempt by attempt, for something that the lock is for, which the caller holds.
func (s *Siege) until(ctx context.Context, done func() bool) error {
	for !done() {
		more := s.more
		s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
		}
		s.mu.Lock()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// Stop ends the siege. The apps must still be there.
func (s *Siege) Stop() error {
	s.cancel()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// Judge holds all attempts that ended since the last call against the chronicle. After Stop, it also complains of what no attempt explains.
func (s *Siege) Judge() *Tally {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, app := range s.apps { // while no attempt is added: what those that ended have caused has been seen
		seen, silent := app.Take()
		for nonce, v := range seen {
			s.seen[name+" "+nonce] = v
		}
		s.silent[name] += silent
	}
	t := &Tally{Attempts: len(s.attempts)}
	for i := range s.attempts {
		s.judge(t, &s.attempts[i])
	}
	s.attempts = nil
	t.Echoed, s.echoed = s.echoed, 0
	for _, b := range s.breaks {
		s.judgeBreak(t, &b)
	}
	s.breaks = nil
	if s.ctx.Err() == nil {
		return t
	}
	for app, n := range s.silent {
		if n > 0 {
			t.complain("the app of %s accepted %d connections that nobody who was allowed to had begun", app, n)
		}
	}
	for _, known := range []map[string]bool{s.streams, s.late} {
		for nonce := range known {
			delete(s.seen, nonce)
		}
	}
	for nonce, v := range s.seen {
		t.complain("an app saw a connection that nobody had begun, at %s from %s: %q", clock(v.At), v.From, nonce)
	}
	return t
}

// judge adds one attempt to a tally.
func (s *Siege) judge(t *Tally, a *Attempt) {
	app := s.apps[a.Target.App]
	visit, reached := s.seen[a.Target.App+" "+a.Nonce]
	delete(s.seen, a.Target.App+" "+a.Nonce)
	ended := a.Ended
	if reached && visit.At.After(ended) {
		ended = visit.At
	}
	answered := a.Answer == a.wanted(app)
	if answered {
		t.Answered++
	}
	what := fmt.Sprintf("%s → %s (%s), %s to %s", a.Peer, a.Target.Name, a.Target.Addr, clock(a.Began), clock(ended))
	v, states := s.chronicle.Judge(a.Peer, a.Target.Name, a.Began, ended)
	switch {
	case a.Answer != "" && !answered:
		t.complain("%s: somebody else answered: %q", what, a.Answer)
	case answered && !reached:
		t.complain("%s: answered, and the app has not seen it", what)
	}
	if a.Target.Protocol == verdict.TCP && v != Denied && !answered && !reached && s.silent[a.Target.App] > 0 {
		s.silent[a.Target.App]-- // admitted by one lock, and not by the next
	}
	s.missed(t, a, v, answered, what)
	switch v {
	case Denied:
		t.Denied++
		t.Windows.note(a.Peer, states, Judged{Denied: 1})
		if answered || reached || a.Answer != "" {
			t.complain("%s: had to be denied and was admitted (answer %q, seen by the app: %v)", what, a.Answer, reached)
		}
	case Allowed:
		t.Allowed++
		t.Windows.note(a.Peer, states, Judged{Allowed: 1})
		if a.Target.Protocol == verdict.TCP && !answered && !s.isExcused(a.Peer, a.Target.Pod, a.Began, ended) {
			t.complain("%s: had to be answered and was not: %v (seen by the app: %v)", what, a.Err, reached)
		}
	case Either:
		t.Either++
		t.Windows.note(a.Peer, states, Judged{Either: 1})
	}
}

// missed is told of each exchange of datagrams. Some may be lost, many in a row may not.
func (s *Siege) missed(t *Tally, a *Attempt, v Verdict, answered bool, what string) {
	if a.Target.Protocol != verdict.UDP {
		return
	}
	t.Datagrams++
	if !answered && v != Denied {
		s.late[a.Target.App+" "+a.Nonce] = true
	}
	key := a.Peer + " " + a.Target.Addr.String()
	if answered || v != Allowed || s.isExcused(a.Peer, a.Target.Pod, a.Began, a.Ended) {
		s.mute[key] = 0
		return
	}
	t.Lost++
	if s.mute[key]++; s.mute[key] == muteAtMost {
		t.complain("%s: %d exchanges of datagrams in a row had to be answered and were not: %v", what, muteAtMost, a.Err)
	}
}

func clock(t time.Time) string { return t.Format("15:04:05.000") }
