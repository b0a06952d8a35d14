"""What policies are built of: no policy is in here, so that a listing of the folder above is the list of the policies."""
