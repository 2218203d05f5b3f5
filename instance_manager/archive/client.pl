# archive_command and restore_command, as client.py, which is used where there is no perl: it starts five times as fast,
# and a start for each segment is the largest part of what this costs that is not compression.
#
#     perl -f -T archive_client.pl SOCKET push NAME
#     perl -f -T archive_client.pl SOCKET fetch MODE NAME PATH
#
# No modules. -T also keeps PERL5OPT and PERL5LIB out. Exit codes: 0 done; for fetch 10 "proven absent"; 11 anything else.
use strict;

my ($ABSENT, $FAILED) = (10, 11);
my ($AF_UNIX, $SOCK_STREAM, $PATH_MAX_BYTES) = (1, 1, 107);

sub answer {
    my ($given, @words) = @_;
    my ($path) = $given =~ /\A(.*)\z/s;  # under -T what comes from outside must be taken over by a match
    if ($words[0] eq "fetch" && $words[3] !~ m{^/}) {
        my $directory = readlink("/proc/self/cwd");
        die "the working directory is not known\n" unless defined $directory;
        $words[3] = "$directory/$words[3]";
    }
    die "a line end or a tab in an argument\n" if grep { /[\n\t]/ } @words;
    die "the socket's path is too long\n" if length($path) > $PATH_MAX_BYTES;
    socket(my $connection, $AF_UNIX, $SOCK_STREAM, 0) or die "$!\n";
    connect($connection, pack("S a*", $AF_UNIX, $path)) or die "$!\n";
    my $request = join("\t", @words) . "\n";
    while (length $request) {
        my $sent = syswrite($connection, $request);
        die "$!\n" unless defined $sent;
        substr($request, 0, $sent) = "";
    }
    my $answer = "";
    until ($answer =~ /\n\z/) {
        my $received = sysread($connection, $answer, 65536, length $answer);
        die "$!\n" unless defined $received;
        die "the archiver ended before it answered\n" if $received == 0;
    }
    chomp $answer;
    return $answer;
}

my $answer = eval { answer(@ARGV) };
if (!defined $answer) {
    print STDERR "archive: no answer of the archiver: $@";
    exit $FAILED;
}
my ($word, $text) = split / /, $answer, 2;
print STDERR "archive: $text\n" if defined $text && length $text;
exit($word eq "done" ? 0 : $word eq "absent" ? $ABSENT : $FAILED);
